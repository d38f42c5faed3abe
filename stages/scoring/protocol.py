"""What a scorer is."""

from collections.abc import Sequence
from typing import Protocol

from stages.data.records import Completion


class Scorer(Protocol):
    """Higher is better."""

    def score(self, completions: Sequence[Completion]) -> list[float]:
        """One score per completion, in order."""
