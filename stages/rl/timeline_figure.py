"""The picture of a timeline: a few typical updates in detail, and below them the whole run."""

import heapq
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from stages.rl.timeline import GENERATOR, KINDS, LEARNER, SCORER, Span, union_s

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

Lanes = dict[str, list[Span]]
"""Spans without overlap by role, in the order in which they are drawn."""

WINDOW_UPDATES = 6
NUM_BINS = 60
BAR_HEIGHT = 0.74
MIN_LABEL_FRACTION = 0.035
"""A bar narrower than this part of the window has no room for its policy version."""
MIN_EDGE_FRACTION = 0.004
"""A bar narrower than this part of the window would disappear behind its own white edge."""

# Okabe and Ito 2008, which also colour-blind readers tell apart, and greys for what is not work.
COLORS = {
    "generate": "#56B4E9",
    "swap": "#D55E00",
    "score": "#009E73",
    "reference": "#F0E442",
    "learn": "#E69F00",
    "publish": "#CC79A7",
    "evaluate": "#0072B2",
    "checkpoint": "#000000",
    "record": "#7B4B94",
    "start": "#8C8C8C",
    "wait": "#DCDCDC",
}


def draw_timeline(spans: Sequence[Span], *, from_s: float | None = None, to_s: float | None = None) -> "Figure":
    """Lanes of all roles: what they did between two moments, and their shares of time over the whole run.

    Args:
        spans: at least one.
        from_s: start of the upper part; without it, `WINDOW_UPDATES` typical updates are shown.
        to_s: end of the upper part.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    typical = select_window(spans)
    window = typical[0] if from_s is None else from_s, typical[1] if to_s is None else to_s
    lanes = _build_lanes(spans)
    figure = Figure(figsize=(12, 2.4 + 0.9 * len(lanes)), layout="constrained")
    upper, lower = figure.subplots(2, 1)
    _draw_window(upper, lanes, window)
    _draw_run(lower, lanes, window)
    present = {span.kind for span in spans}
    handles = [Patch(color=COLORS[kind], label=kind) for kind in KINDS if kind in present]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def select_window(spans: Sequence[Span]) -> tuple[float, float]:
    """Start and end of `WINDOW_UPDATES` updates of median length, from the middle half of the run."""
    run = min(span.start_s for span in spans), max(span.end_s for span in spans)
    starts: dict[int, float] = {}
    for span in sorted(spans, key=lambda span: span.start_s):
        if span.kind == "learn":
            starts.setdefault(span.policy_version, span.start_s)
    moments = [*starts.values(), run[1]]
    windows = list(zip(moments, moments[WINDOW_UPDATES:], strict=False))
    if not windows:
        return run
    quarter = len(windows) // 4
    middle = sorted(windows[quarter : len(windows) - quarter], key=lambda window: window[1] - window[0])
    return middle[len(middle) // 2]


def _build_lanes(spans: Sequence[Span]) -> Lanes:
    by_role: Lanes = {}
    for span in spans:
        by_role.setdefault(span.role, []).append(span)
    return {role: _cut_overlaps(by_role[role]) for role in sorted(by_role, key=_lane_order)}


def _lane_order(role: str) -> tuple[int, int, str]:
    name, _, number = role.partition("-")
    names = (LEARNER, SCORER, GENERATOR)
    return (names.index(name) if name in names else len(names), int(number) if number.isdigit() else 0, role)


def _cut_overlaps(spans: Sequence[Span]) -> list[Span]:
    """At every moment only the span that started last, so that a part hides the whole that it belongs to.

    Neighbours that touch and are of one kind and version become one.
    """
    upcoming = sorted(enumerate(spans), key=lambda item: item[1].start_s, reverse=True)
    running: list[tuple[float, int, Span]] = []  # a heap, the last started first
    pieces: list[Span] = []
    for start, end in pairwise(sorted({moment for span in spans for moment in (span.start_s, span.end_s)})):
        while upcoming and upcoming[-1][1].start_s <= start:
            number, span = upcoming.pop()
            heapq.heappush(running, (-span.start_s, -number, span))
        while running and running[0][2].end_s <= start:
            heapq.heappop(running)
        if running:
            piece = replace(running[0][2], start_s=start, end_s=end)
            if pieces and replace(pieces[-1], start_s=start, end_s=end) == piece and pieces[-1].end_s == start:
                piece = replace(piece, start_s=pieces.pop().start_s)
            pieces.append(piece)
    return pieces


def _draw_window(axes: "Axes", lanes: Lanes, window: tuple[float, float]) -> None:
    start, end = window
    for lane, spans in enumerate(lanes.values()):
        visible = [span for span in spans if span.end_s > start and span.start_s < end]
        for kind in KINDS:
            ranges = [(span.start_s, span.end_s - span.start_s) for span in visible if span.kind == kind]
            edges = [0.6 if width > MIN_EDGE_FRACTION * (end - start) else 0.0 for _, width in ranges]
            axes.broken_barh(
                ranges, (lane - BAR_HEIGHT / 2, BAR_HEIGHT), color=COLORS[kind], edgecolor="white", linewidth=edges
            )
        for span in visible:
            if span.kind in ("generate", "learn"):
                _label_version(axes, lane, span, window)
    _format_lanes(axes, lanes, window)
    axes.set_title("A few updates; v: version of the policy that is sampled or trained", loc="left", fontsize=10)


def _label_version(axes: "Axes", lane: int, span: Span, window: tuple[float, float]) -> None:
    start, end = max(span.start_s, window[0]), min(span.end_s, window[1])
    if end - start > MIN_LABEL_FRACTION * (window[1] - window[0]):
        axes.text((start + end) / 2, lane, f"v{span.policy_version}", ha="center", va="center", fontsize=8)


def _draw_run(axes: "Axes", lanes: Lanes, window: tuple[float, float]) -> None:
    everything = [span for spans in lanes.values() for span in spans]
    start, end = min(span.start_s for span in everything), max(span.end_s for span in everything)
    edges = np.linspace(start, end, NUM_BINS + 1)
    for lane, spans in enumerate(lanes.values()):
        bottom = np.full(NUM_BINS, lane + BAR_HEIGHT / 2)
        for kind in KINDS:
            top = bottom - BAR_HEIGHT * _bin_shares([span for span in spans if span.kind == kind], edges)
            axes.stairs(top, edges, baseline=bottom, fill=True, color=COLORS[kind], linewidth=0)
            bottom = top
        limits = [lane - BAR_HEIGHT / 2, lane + BAR_HEIGHT / 2]
        axes.hlines(limits, start, end, color=COLORS["wait"], linewidth=0.6, zorder=0)
        busy_s = union_s(span for span in spans if span.kind != "wait")
        axes.text(1.01, lane, f"{busy_s / (end - start):.0%} busy", va="center", transform=axes.get_yaxis_transform())
    axes.axvspan(*window, facecolor="none", edgecolor="black", linewidth=1, zorder=3)
    _format_lanes(axes, lanes, (start, end))
    axes.set_title("The whole run in shares of time; the frame is what is shown above", loc="left", fontsize=10)
    axes.set(xlabel="seconds since the run began")


def _bin_shares(spans: Sequence[Span], edges: "NDArray[np.float64]") -> "NDArray[np.float64]":
    """Part of each bin that the spans, which do not overlap, cover."""
    starts = np.array([span.start_s for span in spans])
    lengths = np.array([span.end_s - span.start_s for span in spans])
    covered_until = np.array([np.clip(edge - starts, 0.0, lengths).sum() for edge in edges])
    return np.diff(covered_until) / np.diff(edges)


def _format_lanes(axes: "Axes", lanes: Lanes, window: tuple[float, float]) -> None:
    axes.set_yticks(range(len(lanes)), list(lanes))
    axes.set(xlim=window, ylim=(len(lanes) - 0.5, -0.5))
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
