"""A task with a rule, from its file to pass@k, on a two-layer model: no reward model anywhere."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from stages.data.token_pairs import read_token_pairs, write_token_pairs
from tests.integration.conftest import Project, make_project

SETTINGS: dict[str, Any] = {
    "data.task": {"name": "problems", "source": "inputs/data/problems.jsonl"},
    "sft.num_epochs": 15,  # enough for '#### 1' and '#### 2', not for which of them: half of the samples are right
    "sft.checkpoint_every": 1000,
    "sft.batch_size": 8,
    "rl.num_updates": 2,
    "judge.samples_per_prompt": 3,
}
STAGES = ("prepare_model", "prepare_data", "train_sft", "label_pairs", "train_reward", "train_policy")
JUDGES = ("sample_policy", "judge_policy")


def write_problems(path: Path) -> None:
    """Coins: the problem says nothing about the answer."""
    generator = random.Random(0)
    rows = [{"question": f"{number}?", "answer": f"#### {generator.choice('12')}"} for number in range(48)]
    path.write_text("\n".join(json.dumps(row) for row in rows))


def read_metrics(project: Project, stage: str) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((project.path / f"metrics/{stage}.json").read_text())
    return metrics


def test_a_rule_takes_the_reward_models_place_from_pairs_to_pass_at_k(tmp_path: Path) -> None:
    project = make_project(tmp_path)
    write_problems(tmp_path / "inputs/data/problems.jsonl")
    project.edit(SETTINGS)

    for stage in (*STAGES, *JUDGES):
        project.run(f"stages.{stage}")

    rule = json.loads((tmp_path / "artifacts/reward/rule.json").read_text())
    assert [path.name for path in (tmp_path / "artifacts/reward").iterdir()] == ["rule.json"]
    assert len(rule["answers"]) == 48
    assert set(rule["answers"].values()) == {"1", "2"}
    assert read_metrics(project, "pairs")["num_pairs_train"] > 0
    assert read_metrics(project, "reward")["rule_agreement"] > 0.5
    assert read_metrics(project, "policy")["updates"] == 2
    judge = read_metrics(project, "judge")
    for model in ("sft", "policy"):
        rates = [judge[f"pass_at_{k}_{model}"] for k in (1, 2, 3)]
        assert 0 < rates[0] <= rates[1] <= rates[2] <= 1
        assert [judge[f"gold_mean_{model}"], judge[f"proxy_mean_{model}"]] == pytest.approx([rates[0]] * 2)
        low, high = judge[f"pass_at_1_{model}_interval"]
        assert low <= rates[0] <= high
    assert "pass_at_4_policy" not in judge

    for split in ("train", "validation"):  # as if every prompt's completions scored alike
        path = tmp_path / f"artifacts/pairs/{split}.parquet"
        assert read_token_pairs(path)
        write_token_pairs(path, [])
    project.run("stages.train_reward")

    assert json.loads((tmp_path / "artifacts/reward/rule.json").read_text()) == rule
    assert read_metrics(project, "reward") == {
        "kind": "rule",
        "rule_agreement": None,
        "rule_agreement_interval": None,
        "num_pairs": 0,
    }
