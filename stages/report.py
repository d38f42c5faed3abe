"""What the last run achieved, as a short table: `python -m stages.report`."""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stages.common.entry import run_entry
from stages.common.errors import InputError
from stages.common.links import is_judged
from stages.common.pipeline_record import read_timings

METRICS = Path("metrics")
NOT_MEASURED = "–"

Rows = list[tuple[str, str]]


def main() -> None:
    """Print the results that are there; a stage that has not run is left out, as is the verdict on another policy."""
    sys.stdout.write(format_report(METRICS, read_timings()))


def format_report(metrics: Path, timings: dict[str, float]) -> str:
    """The whole report, ready to print."""
    reward = read_metrics(metrics / "reward.json")
    scorer = reward.get("kind", "reward model")
    rows = [
        *_judge_rows(read_metrics(metrics / "judge.json") if is_judged() else {}, scorer),
        *_policy_rows(read_metrics(metrics / "policy.json"), scorer),
        *_reward_rows(reward),
        *_sft_rows(read_metrics(metrics / "sft.json")),
    ]
    parts = [_format_table("Result", rows or [("no stage has finished yet", "run `make run`")])]
    if timings:
        times = [(stage, f"{wall_s / 60:.1f} min") for stage, wall_s in timings.items()]
        times.append(("total", f"{sum(timings.values()) / 60:.1f} min"))
        parts.append(_format_table("Time of each stage's last run", times))
    parts.append(_format_table("Where to look next", _next_rows()))
    return "\n".join(parts)


def read_metrics(path: Path) -> dict[str, Any]:
    """Metrics a stage wrote; empty if it has not run.

    Raises:
        InputError: the file is not JSON.
    """
    try:
        metrics: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from error
    return metrics


def _judge_rows(judge: dict[str, Any], scorer: str) -> Rows:
    if not judge:
        return []
    rows = [
        ("gold win-rate of the policy over SFT", _with_interval(judge, "gold_win_rate", percent=True)),
        ("gold score, SFT → policy", _pair(judge, "gold_mean_sft", "gold_mean_policy")),
        (f"{scorer}'s win-rate of the policy", _number(judge.get("proxy_win_rate"))),
        ("second score, SFT → policy", _pair(judge, "second_mean_sft", "second_mean_policy")),
        ("pass@1 of the SFT model", _with_interval(judge, "pass_at_1_sft", percent=True)),
        ("pass@1 of the policy", _with_interval(judge, "pass_at_1_policy", percent=True)),
        ("KL to SFT", _number(judge.get("kl_nats"), " nats")),
        ("completion length, policy / SFT", _number(judge.get("length_ratio"))),
        ("held-out prompts", _count(judge.get("num_prompts"))),
    ]
    return [row for row in rows if row[1] != NOT_MEASURED]


def _policy_rows(policy: dict[str, Any], scorer: str) -> Rows:
    if not policy:
        return []
    if "num_pairs" in policy:  # an offline run
        return [
            (
                "loss on validation pairs, first → last update",
                _pair(policy, "validation_loss_first", "validation_loss_last"),
            ),
            ("validation pairs ranked as labelled", _number(policy.get("validation_accuracy"))),
            ("updates / training pairs", f"{_count(policy.get('updates'))} / {_count(policy.get('num_pairs'))}"),
        ]
    return [
        (f"{scorer}'s score, first → last update", _pair(policy, "score_first", "score_last")),
        ("updates / completions", f"{_count(policy.get('updates'))} / {_count(policy.get('samples_total'))}"),
    ]


def _reward_rows(reward: dict[str, Any]) -> Rows:
    if not reward:
        return []
    if reward.get("kind") == "rule":
        agreement = _with_interval(reward, "rule_agreement", percent=True)
        return [("rule's agreement with labelled pairs", f"{agreement}, {_count(reward.get('num_pairs'))} pairs")]
    accuracy = _with_interval(reward, "accuracy", percent=True)
    return [
        (
            f"{reward.get('kind', 'reward model')}'s held-out accuracy",
            f"{accuracy}, {_count(reward.get('num_pairs'))} pairs",
        )
    ]


def _sft_rows(sft: dict[str, Any]) -> Rows:
    if not sft:
        return []
    rows = [("SFT held-out loss, before → after", _pair(sft, "eval_loss_before", "eval_loss"))]
    return [*rows, ("SFT held-out perplexity", _perplexities(sft))]


def _perplexities(sft: dict[str, Any]) -> str:
    before = sft.get("eval_loss_before")
    # Past a loss of 700 nats the exponential overflows; no loss worth showing is near it.
    shown = _number(math.exp(before)) if before is not None and before < 700 else NOT_MEASURED
    return f"{shown} → {_number(sft.get('perplexity'))}"


def _next_rows() -> Rows:
    return [
        ("artifacts/samples.md", "what SFT model and policy write, side by side"),
        ("make ui", "every curve, sample and verdict in MLflow"),
        ("make chat", "talk to the policy"),
    ]


def _with_interval(values: dict[str, Any], name: str, *, percent: bool) -> str:
    value = values.get(name)
    if value is None:
        return NOT_MEASURED
    scale, unit = (100.0, " %") if percent else (1.0, "")
    interval: Sequence[float | None] | None = values.get(f"{name}_interval")
    text = f"{value * scale:.1f}"
    if interval and None not in interval:
        text += f" [{', '.join(f'{bound * scale:.1f}' for bound in interval if bound is not None)}]"
    return text + unit


def _pair(values: dict[str, Any], before: str, after: str) -> str:
    if values.get(before) is None and values.get(after) is None:
        return NOT_MEASURED
    return f"{_number(values.get(before))} → {_number(values.get(after))}"


def _number(value: float | None, unit: str = "") -> str:
    return NOT_MEASURED if value is None else f"{value:.2f}{unit}"


def _count(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:,.0f}"


def _format_table(title: str, rows: Rows) -> str:
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name:<{width}}  {value}" for name, value in rows]
    return "\n".join([title, *lines, ""])


if __name__ == "__main__":
    run_entry(main)
