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

from stages.common.entry import ENVIRONMENT_DEFAULTS
from stages.common.process import free_port
from stages.rl.ledger.checks.run import check_ledger
from tests.integration.conftest import TIMEOUT_S
from tests.toy_recipes import ROOT, run_toy_recipe

RECIPES = {path.name.removesuffix(".yaml"): path for path in sorted((ROOT / "recipes").glob("*.yaml"))}
ON_TWO_RANKS, WITH_RULE = "tldr_pythia_410m", "gsm8k_rho_1b"


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
        for name, value in ENVIRONMENT_DEFAULTS.items():
            patch.setenv(name, value)
        with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as executor:
            yield executor


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_from_its_base_model_to_the_judge(
    directory: Path, worker: ProcessPoolExecutor, recipe: str
) -> None:
    path = run(directory, worker, recipe)

    params = yaml.safe_load((path / "params.yaml").read_text())
    assert_trained(path, "base", "sft")
    assert_trained(path, "sft", "policy_last")
    for name in ("sft", "policy"):
        assert_finite_curve(path / f"plots/{name}.csv", "learner/loss")
    assert_finite_curve(path / "plots/policy.csv", "eval/kl_nats")
    assert [violation for check in check_ledger(path / "artifacts/ledger") for violation in check.violations] == []
    assert read_metrics(path, "policy")["updates"] == params["rl"]["num_updates"]
    assert_judged(path, params)


def test_a_recipe_of_another_architecture_than_llama_trains_on_two_ranks(
    directory: Path, worker: ProcessPoolExecutor
) -> None:
    path = copy(run(directory, worker, ON_TWO_RANKS), "rl", {"num_ranks": 2, "zero_stage": 3})
    shutil.rmtree(path / "artifacts/policy_last")

    run_in(path, "-m", "stages.train_policy")

    assert_trained(path, "sft", "policy_last")
    assert [violation for check in check_ledger(path / "artifacts/ledger") for violation in check.violations] == []


def test_ranks_of_a_launcher_do_not_wait_for_a_reward_model_where_a_rule_is(
    directory: Path, worker: ProcessPoolExecutor
) -> None:
    path = copy(run(directory, worker, WITH_RULE), "reward", {"num_ranks": 2})
    rule = (path / "artifacts/reward/rule.json").rename(path / "rule.json").read_bytes()
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]

    run_in(path, *launcher, f"--master-port={free_port()}", "-m", "stages.train_reward")

    assert (path / "artifacts/reward/rule.json").read_bytes() == rule


def run(directory: Path, worker: ProcessPoolExecutor, recipe: str) -> Path:
    """Where the recipe has run, now or for an earlier test."""
    path = directory / recipe
    if not path.exists():
        worker.submit(run_toy_recipe, RECIPES[recipe], path).result(TIMEOUT_S)
    return path


def copy(path: Path, section: str, learner: dict[str, Any]) -> Path:
    """A copy with other settings of a section's learner."""
    target = path.with_name(f"{path.name}-{section}")
    shutil.copytree(path, target, symlinks=True)
    params = yaml.safe_load((target / "params.yaml").read_text())
    params[section]["learner"] |= learner
    (target / "params.yaml").write_text(yaml.safe_dump(params))
    return target


def run_in(path: Path, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr[-3000:]


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
    assert (path / "artifacts/reward/rule.json").is_file() == is_rule
    assert (path / "artifacts/reward/classifier.json").is_file() == ("classifier" in params["reward"])


def read_metrics(path: Path, stage: str) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((path / f"metrics/{stage}.json").read_text())
    return metrics
