"""Intervals for means over prompts."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000


def bootstrap_interval(values: Sequence[float], groups: Sequence[str], seed: int) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of `values`, resampling whole groups.

    Values of one prompt are not independent, so prompts are what is drawn again.

    Args:
        values: one per comparison.
        groups: prompt of each value.
        seed: of its own generator.
    """
    totals, counts = _sum_by_group(values, groups)
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(totals), size=(RESAMPLES, len(totals)))
    means = totals[draws].sum(axis=1) / counts[draws].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _sum_by_group(values: Sequence[float], groups: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    names = sorted(set(groups))
    position = {name: index for index, name in enumerate(names)}
    totals, counts = np.zeros(len(names)), np.zeros(len(names))
    for value, group in zip(values, groups, strict=True):
        totals[position[group]] += value
        counts[position[group]] += 1
    return totals, counts
