"""Every recipe trains, from its own settings to the judge, on a two-layer model of its architecture in this process."""

import csv
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from stages.common.entry import QUIET_DEFAULTS
from stages.rl.ledger.checks.run import check_ledger
from tests.integration.conftest import TIMEOUT_S
from tests.toy_recipes import ROOT, run_toy_recipe

RECIPES = {path.name.removesuffix(".yaml"): path for path in sorted((ROOT / "recipes").glob("*.yaml"))}
ON_TWO_RANKS = "tldr_pythia_410m"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the directory of each recipe, and one MLflow store of them all."""
    return tmp_path_factory.mktemp("recipes")


@pytest.fixture(scope="module")
def worker(directory: Path) -> Iterator[ProcessPoolExecutor]:
    """One process for all recipes: imports take longer than a toy recipe, and warnings are errors here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{directory / 'mlflow.db'}")
        for name in ("SLIPSTREAM_PIPELINE", "DVC_STAGE"):
            patch.delenv(name, raising=False)
        for name, value in QUIET_DEFAULTS.items():
            patch.setenv(name, value)
        with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as executor:
            yield executor


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_from_its_base_model_to_the_judge(
    directory: Path, worker: ProcessPoolExecutor, recipe: str
) -> None:
    path = directory / recipe

    worker.submit(run_toy_recipe, RECIPES[recipe], path).result(TIMEOUT_S)

    params = yaml.safe_load((path / "params.yaml").read_text())
    assert_trained(path, "base", "sft")
    assert_trained(path, "sft", "policy_last")
    for name in ("sft", "policy"):
        assert_finite_curve(path / f"plots/{name}.csv", "learner/loss")
    assert_finite_curve(path / "plots/policy.csv", "eval/kl_nats")
    assert [violation for check in check_ledger(path / "artifacts/ledger") for violation in check.violations] == []
    assert read_metrics(path, "policy")["updates"] == params["rl"]["num_updates"]
    assert_judged(path, params)


@pytest.mark.usefixtures("worker")
def test_a_recipe_of_another_architecture_than_llama_trains_on_two_ranks(directory: Path) -> None:
    path = directory / "two_ranks"
    shutil.copytree(directory / ON_TWO_RANKS, path, symlinks=True)
    params = yaml.safe_load((path / "params.yaml").read_text())
    params["rl"]["learner"] |= {"num_ranks": 2, "zero_stage": 3}
    (path / "params.yaml").write_text(yaml.safe_dump(params))
    shutil.rmtree(path / "artifacts/policy_last")

    done = subprocess.run(
        [sys.executable, "-m", "stages.train_policy"],
        cwd=path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )

    assert done.returncode == 0, done.stderr[-3000:]
    assert_trained(path, "sft", "policy_last")
    assert [violation for check in check_ledger(path / "artifacts/ledger") for violation in check.violations] == []


def assert_trained(path: Path, before: str, after: str) -> None:
    """Same tensors, some with other numbers, all of them finite."""
    theirs, ours = (load_file(path / "artifacts" / name / "model.safetensors") for name in (before, after))
    assert ours.keys() == theirs.keys()
    assert all(bool(torch.isfinite(weight).all()) for weight in ours.values())
    assert any(not torch.equal(weight, theirs[name]) for name, weight in ours.items())


def assert_finite_curve(path: Path, column: str) -> None:
    with path.open() as file:
        values = [float(row[column]) for row in csv.DictReader(file) if row[column]]
    assert values
    assert all(map(math.isfinite, values)), values


def assert_judged(path: Path, params: dict[str, Any]) -> None:
    """A win-rate by whoever scores in this recipe; of a rule also pass@1."""
    judge = read_metrics(path, "judge")
    is_rule = params["data"]["task"]["name"] == "problems"
    has_gold = is_rule or params["data"]["task"].get("gold") or params["data"]["task"]["name"] == "reviews"
    assert 0 <= judge["proxy_win_rate"] <= 1
    assert judge["gold_win_rate"] is not None if has_gold else judge["gold_win_rate"] is None
    assert math.isfinite(judge["kl_nats"])
    assert ("pass_at_1_policy" in judge) == is_rule


def read_metrics(path: Path, stage: str) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((path / f"metrics/{stage}.json").read_text())
    return metrics
