"""A study's figure: final gold win-rate by what was varied and against KL, or the curves of its runs."""

import statistics
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from study_grids import Study
from study_table import group, win_rate_interval

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's, which stay apart for colour-blind readers."""
MARKERS = ("o", "s", "^", "D", "v", "P")


def draw(study: Study, report: dict[str, Any], path: Path) -> None:
    """Write the figure; two panels."""
    cells = list(report["cells"].values())
    if not cells:
        raise SystemExit(f"{path.with_suffix('.json')}: holds no cell to draw; run the study first")
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6))
    if study.figure == "points":
        draw_by_x(left, study, cells)
        draw_by_kl(right, study, cells)
    else:
        draw_curves(left, study, cells, "samples", "completions sampled")
        draw_curves(right, study, cells, "elapsed_s", "seconds of training, evaluations included")
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, frameon=False, fontsize=9, ncols=len(names), loc="lower center")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(study.question, fontsize=10)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def styles(study: Study, cells: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]], str, str]]:
    """Name, cells, colour and marker of each line; the look is the line's own, whichever others have run."""
    names = sorted({cell.labels[study.series] for cell in study.cells})
    looks = dict(zip(names, zip(cycle(COLOURS), cycle(MARKERS), strict=False), strict=False))
    return [
        (f"{study.series} = {name}" if isinstance(name, int) else str(name), members, *looks[name])
        for (name,), members in group(cells, [study.series]).items()
    ]


def draw_by_x(axes: Axes, study: Study, cells: list[dict[str, Any]]) -> None:
    """Mean over seeds with the interval over prompts; lines are shifted a little so that bars stay apart."""
    values = sorted({cell[study.x] for cell in cells})
    lines = styles(study, cells)
    for number, (name, members, colour, marker) in enumerate(lines):
        shift = 0.08 * (number - (len(lines) - 1) / 2)
        points = group(members, [study.x])
        rates = [statistics.mean(cell["gold_win_rate"] for cell in found) for found in points.values()]
        ends = [win_rate_interval(found) for found in points.values()]
        bars = [
            [rate - low for rate, (low, _) in zip(rates, ends, strict=True)],
            [high - rate for rate, (_, high) in zip(rates, ends, strict=True)],
        ]
        places = [values.index(x) + shift for (x,) in points]
        axes.errorbar(places, rates, bars, label=name, color=colour, marker=marker, capsize=3)
    axes.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(values)), [str(value) for value in values])
    axes.set_xlabel(study.x_title)
    axes.set_ylabel("gold win-rate over SFT [95 % over prompts]")


def draw_by_kl(axes: Axes, study: Study, cells: list[dict[str, Any]]) -> None:
    """Means over seeds, with the standard deviation of the KL over them, and the value of x beside each."""
    for _, members, colour, marker in styles(study, cells):
        for (x,), found in group(members, [study.x]).items():
            kls = [cell["kl_nats"] for cell in found]
            kl, rate = statistics.mean(kls), statistics.mean(cell["gold_win_rate"] for cell in found)
            low, high = win_rate_interval(found)
            across = statistics.stdev(kls) if len(kls) > 1 else None
            bars = {"yerr": [[rate - low], [high - rate]], "xerr": across, "elinewidth": 0.7}
            axes.errorbar(kl, rate, color=colour, marker=marker, **bars)
            axes.annotate(str(x), (kl, rate), xytext=(5, 4), textcoords="offset points", fontsize=8, color=colour)
    axes.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xlabel(f"KL(policy ‖ SFT), nats a completion, ± std over seeds (beside a point: {study.x})")
    axes.set_ylabel("gold win-rate over SFT [95 % over prompts]")


def draw_curves(axes: Axes, study: Study, cells: list[dict[str, Any]], x: str, title: str) -> None:
    """Proxy score on validation prompts, a line a run, dashed if the policy is the whole model; named once a series."""
    for name, members, colour, marker in styles(study, cells):
        for number, cell in enumerate(members):
            points = [(point.get(x, 0.0), point["proxy"]) for point in cell["curve"]]
            label = name if number == 0 else None
            dashes = "--" if cell.get("policy") == "whole" else "-"
            axes.plot(*zip(*points, strict=True), dashes, color=colour, marker=marker, markersize=3, label=label)
    is_dashed = any(cell.get("policy") == "whole" for cell in cells)
    axes.set_xlabel(title + (" (dashed: the whole model)" if is_dashed else ""))
    axes.set_ylabel("reward model's score, validation prompts")
