"""A study's numbers as Markdown, and what they say about the papers' claims."""

import statistics
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from scipy.stats import t as student
from study_grids import Study

LOSSES = {"gold_win_rate": "of the gold win-rate", "proxy_mean_policy": "of the score", "kl_nats": "nats of KL"}
UNITS = {"samples": "completions", "elapsed_s": "seconds"}


def format_report(study: Study, report: dict[str, Any]) -> str:
    """Table over seeds, failures, and the comparisons that the study is about."""
    cells = list(report["cells"].values())
    parts = ["\n".join(list_rows(study, cells))]
    if report["failed"]:
        parts.append("\n".join(f"- failed: {key}: {item['reason']}" for key, item in report["failed"].items()))
    if study.x == "N":
        parts.append("\n".join(list_losses(study.series, cells)))
    if study.series == "arm":
        parts.append("\n".join(list_speeds(cells)))
    if study.figure == "curves":
        parts += ["\n".join(list_equal(study.series, cells, budget)) for budget in ("samples", "elapsed_s")]
    return "\n\n".join(part for part in parts if part)


def list_rows(study: Study, cells: list[dict[str, Any]]) -> Iterator[str]:
    """A row for each group of seeds."""
    titles = [study.series, study.x] if study.series != "arm" else ["arm"]
    yield (
        f"| {' | '.join(titles)} | seeds | gold win-rate [95 %] | KL, nats | proxy, SFT → policy | length ratio | "
        "staleness, mean (max) | updates | samples | s / update | learner's peak GiB |"
    )
    yield "|" + "---|" * (len(titles) + 10)
    for labels, members in group(cells, titles).items():
        first = members[0]
        proxies = f"{describe(members, 'proxy_mean_sft')} → {describe(members, 'proxy_mean_policy')}"
        row = [*labels, len(members), describe_win_rate(members), describe(members, "kl_nats"), proxies]
        row += [describe(members, "length_ratio"), f"{first['staleness_mean']:.1f} ({first['staleness_max']})"]
        row += [first["updates"], first["samples_total"]]
        row += [describe(members, "wall_s_per_update"), describe(members, "learner_peak_gib")]
        yield "| " + " | ".join(map(str, row)) + " |"


def list_losses(series: str, cells: list[dict[str, Any]]) -> Iterator[str]:
    """Gold win-rate, score and KL on policy less those at each larger N, seed by seed."""
    for (name,), members in group(cells, [series]).items():
        found = {(cell["N"], cell["seed"]): cell for cell in members}
        for largest in sorted({n for n, _ in found} - {1}):
            pairs = [(found[1, seed], cell) for (n, seed), cell in found.items() if n == largest and (1, seed) in found]
            if pairs:
                losses = [
                    f"{describe_differences([fresh[column] - stale[column] for fresh, stale in pairs])} {title}"
                    for column, title in LOSSES.items()
                ]
                yield f"- {name}: from N = 1 to N = {largest} it loses {', '.join(losses)} ({len(pairs)})"


def list_speeds(cells: list[dict[str, Any]]) -> Iterator[str]:
    """Seconds against the synchronous arm of the same seed, and overlap_efficiency as overlap.py defines it."""
    alone = {cell["seed"]: cell for cell in cells if cell["arm"].startswith("sync, one")}
    for (arm,), members in group(cells, ["arm"]).items():
        pairs = [(cell, alone[cell["seed"]]) for cell in members if cell["seed"] in alone]
        if not pairs:
            continue
        ratio = statistics.mean(other["wall_s"] / cell["wall_s"] for cell, other in pairs)
        overlap = statistics.mean(
            max(other["wait_for_rollouts_s"], other["learner_busy_s"]) / cell["wall_s"] for cell, other in pairs
        )
        yield f"- {arm}: {ratio:.2f} times as fast as in turns on one core each, overlap_efficiency {overlap:.2f}"


def list_equal(series: str, cells: list[dict[str, Any]], budget: str) -> Iterator[str]:
    """Validation score when the one that ended first had ended, by samples or seconds, for each policy size."""
    for _, sized in group([{"policy": "", **cell} for cell in cells], ["policy"]).items():
        least = min(cell["curve"][-1][budget] for cell in sized)
        for labels, members in group(sized, ["policy", series]).items():
            scores = [read_at(cell["curve"], budget, least) for cell in members]
            spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
            name = " ".join(part for part in labels if part)
            yield f"- {name}: score {statistics.mean(scores):.2f}{spread} after {least:.0f} {UNITS[budget]}"


def read_at(curve: list[dict[str, float]], name: str, place: float) -> float:
    """The score between the two evaluations around a place, on the line through them; the last one beyond the end."""
    for left, right in pairwise(curve):
        if place <= right[name]:
            start = left.get(name, 0.0)  # before the first update nothing is counted
            share = (place - start) / (right[name] - start)
            return left["proxy"] + max(0.0, share) * (right["proxy"] - left["proxy"])
    return curve[-1]["proxy"]


def group(cells: list[dict[str, Any]], labels: list[str]) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Cells by the values of these labels, sorted."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for cell in sorted(cells, key=lambda cell: [cell[label] for label in labels]):
        groups.setdefault(tuple(cell[label] for label in labels), []).append(cell)
    return groups


def describe(members: list[dict[str, Any]], name: str) -> str:
    """Mean ± standard deviation over seeds."""
    values = [member[name] for member in members]
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


def describe_differences(values: list[float]) -> str:
    """Mean of paired differences, with Student's 95 % interval over seeds."""
    mean = statistics.mean(values)
    if len(values) == 1:
        return f"{mean:.2f}"
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.2f} [{mean - half:.2f}, {mean + half:.2f}]"


def describe_win_rate(members: list[dict[str, Any]]) -> str:
    """The same with the interval over held-out prompts, its ends averaged over seeds: the prompts are the same."""
    low, high = win_rate_interval(members)
    return f"{describe(members, 'gold_win_rate')} [{low:.2f}, {high:.2f}]"


def win_rate_interval(members: list[dict[str, Any]]) -> tuple[float, float]:
    """Ends of the bootstrap interval over prompts, each averaged over seeds."""
    low, high = (statistics.mean(member["gold_win_rate_interval"][end] for member in members) for end in (0, 1))
    return low, high
