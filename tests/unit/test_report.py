import json
from pathlib import Path

import pytest

from stages.common.errors import InputError
from stages.report import format_report


def write(folder: Path, name: str, values: dict[str, object]) -> None:
    (folder / name).write_text(json.dumps(values))


def test_results_are_shown_with_their_intervals(tmp_path: Path) -> None:
    write(tmp_path, "judge.json", {
        "gold_win_rate": 0.875, "gold_win_rate_interval": [0.81, 0.93], "gold_mean_sft": 0.09,
        "gold_mean_policy": 0.67, "second_mean_sft": None, "second_mean_policy": None, "kl_nats": 6.6,
        "length_ratio": 1.1, "num_prompts": 1240,
    })  # fmt: skip
    write(tmp_path, "reward.json", {"accuracy": 0.8, "accuracy_interval": None, "num_pairs": 465})
    write(tmp_path, "sft.json", {"eval_loss_before": 2.0, "eval_loss": 1.5, "perplexity": 4.48})

    report = format_report(tmp_path, {"train_sft": 90.0, "train_policy": 630.0})

    assert "87.5 [81.0, 93.0] %" in report
    assert "0.09 → 0.67" in report
    assert "second score" not in report
    assert "80.0 %, 465 pairs" in report
    assert "7.39 → 4.48" in report  # e² = 7.39
    assert "1,240" in report
    assert "12.0 min" in report  # (90 + 630) / 60


def test_an_offline_run_is_shown_by_its_pairs(tmp_path: Path) -> None:
    write(tmp_path, "policy.json", {
        "updates": 22, "samples_total": 0, "num_pairs": 1850, "validation_loss_first": 0.693,
        "validation_loss_last": 0.581, "validation_accuracy": 0.72,
    })  # fmt: skip

    report = format_report(tmp_path, {})

    assert "0.69 → 0.58" in report
    assert "22 / 1,850" in report
    assert "0.72" in report
    assert "reward model's score" not in report


def test_a_task_with_a_rule_shows_what_it_solves_instead_of_a_reward_models_accuracy(tmp_path: Path) -> None:
    write(tmp_path, "judge.json", {"pass_at_1_policy": 0.125, "pass_at_1_policy_interval": [0.1, 0.15]})
    write(tmp_path, "reward.json", {"kind": "rule", "rule_agreement": None, "num_pairs": 0})
    write(tmp_path, "policy.json", {"updates": 40, "score_first": 0.1, "score_last": 0.25})

    report = format_report(tmp_path, {})

    assert "12.5 [10.0, 15.0] %" in report
    assert "pass@1 of the SFT model" not in report
    assert "rule's score, first → last update" in report
    assert "–, 0 pairs" in report
    assert "reward model" not in report


def test_before_the_first_run_it_says_what_to_do(tmp_path: Path) -> None:
    assert "make run" in format_report(tmp_path, {})


def test_nulls_are_shown_as_not_measured(tmp_path: Path) -> None:
    write(tmp_path, "policy.json", {"updates": 40, "score_first": None, "score_last": None})
    write(tmp_path, "sft.json", {"eval_loss_before": None, "eval_loss": None, "perplexity": None})

    assert "– → –" in format_report(tmp_path, {})


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "judge.json").write_text("{")

    with pytest.raises(InputError, match=r"judge\.json: not valid JSON"):
        format_report(tmp_path, {})


LOCK = """
schema: '2.0'
stages:
  train_policy: {{cmd: x, outs: [{{path: artifacts/policy, md5: {trained}.dir}}]}}
  judge_policy: {{cmd: x, deps: [{{path: artifacts/policy, md5: {judged}.dir}}], outs: [{{path: m, md5: aa}}]}}
"""
DVC_YAML = """
stages:
  train_policy: {cmd: x, outs: [artifacts/policy]}
  judge_policy: {cmd: x, deps: [artifacts/policy], outs: [m]}
"""


@pytest.mark.parametrize(("trained", "is_shown"), [("aa", True), ("bb", False)])
def test_a_verdict_on_an_earlier_policy_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: str, is_shown: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "judge.json", {"gold_win_rate": 0.875})
    Path("dvc.yaml").write_text(DVC_YAML)
    Path("dvc.lock").write_text(LOCK.format(trained=trained, judged="aa"))

    assert ("gold win-rate" in format_report(tmp_path, {})) is is_shown
