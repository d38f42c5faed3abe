"""Runs to compare, written out by hand."""

from collections.abc import Mapping
from typing import Any

from stages.judge.compared_run import ComparedRun, SampleRow, VerdictRow

METRICS = {
    "gold_win_rate": 0.75,
    "gold_win_rate_interval_low": 0.7,
    "gold_win_rate_interval_high": 0.8,
    "kl_nats": 2.5,
}


def sample(prompt_id: str, policy: str = "ours", sft: str = "plain", **changed: Any) -> SampleRow:
    scores = {"gold_sft": 0.25, "gold_policy": 0.5, "proxy_sft": -1.0, "proxy_policy": 1.0, "kl_nats": 2.0}
    texts = {"prompt_id": prompt_id, "prompt": f"Opening of {prompt_id}", "sft": sft, "policy": policy}
    return SampleRow.model_validate({**texts, **scores, **changed})


def verdict_row(prompt_id: str, **changed: Any) -> VerdictRow:
    row = {
        "prompt_id": prompt_id,
        "sample_index": 0,
        "opponent": "plain",
        "win": 1.0,
        "choice_policy_first": "first",
        "choice_opponent_first": "second",
        "points_policy": None,
        "points_opponent": None,
        "reason_policy_first": "vivid",
        "reason_opponent_first": None,
    }
    return VerdictRow.model_validate({**row, **changed})


def run(number: int = 0, metrics: Mapping[str, float] = METRICS, **changed: Any) -> ComparedRun:
    fields = {
        "run_id": f"{number:032x}",
        "experiment_id": "1",
        "pipeline": f"pipeline-{number}",
        "name": f"pipeline-pipeline-{number}",
        "commit": "0123456789abcdef",
        "is_dirty": False,
        "started_ms": 1_795_000_000_000,
        "algorithm": "remax",
        "recipe": None,
        "opponent": None,
        "judge_model": None,
        "judge_settings": ("pairwise", "review", "0.0"),
        "metrics": metrics,
        "curve": {},
        "samples": {("a", 0): sample("a"), ("b", 0): sample("b")},
        "verdicts": {},
    }
    return ComparedRun(**{**fields, **changed})
