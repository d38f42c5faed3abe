"""A metric is a total and a count until it is logged, so micro-batches and ranks merge exactly."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Mean:
    """A mean that has not been divided yet."""

    total: Tensor | float
    count: Tensor | float

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> float:
        """The mean; NaN where nothing was counted."""
        count = float(self.count)
        return float(self.total) / count if count else float("nan")


def merge_means(parts: Iterable[Mapping[str, Mean]]) -> dict[str, Mean]:
    """Add up the means of micro-batches, name by name."""
    merged: dict[str, Mean] = {}
    for part in parts:
        for name, mean in part.items():
            merged[name] = merged[name] + mean if name in merged else mean
    return merged
