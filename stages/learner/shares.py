"""Which rank computes which micro-batch: as many on each, the largest side by side."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from stages.data.batches import SequenceBatch


@dataclass(frozen=True)
class Share:
    """What one rank does."""

    places: tuple[int, ...]
    """Micro-batches, by their place among all; the same number for every rank."""
    num_padding: int
    """How many at the end do not count: they are another rank's once more, because shared-out weights are brought and
    gradients are reduced by all ranks together."""

    @property
    def counted(self) -> tuple[int, ...]:
        """Those that count."""
        return self.places[: len(self.places) - self.num_padding]


def split_evenly(sizes: Sequence[int], num_ranks: int) -> list[Share]:
    """Each rank's share.

    In each round the ranks get micro-batches of similar size, so that none waits for long; every other round runs
    backwards, so that no rank always gets the largest.

    Args:
        sizes: padded tokens of each micro-batch, at least one.
        num_ranks: how many shares.
    """
    order = sorted(range(len(sizes)), key=lambda place: (-sizes[place], place))
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    for number, start in enumerate(range(0, len(order), num_ranks)):
        ranks = range(num_ranks) if number % 2 == 0 else reversed(range(num_ranks))
        for rank, place in zip(ranks, order[start : start + num_ranks], strict=False):  # the last round may be short
            shares[rank].append(place)
    most = max(len(share) for share in shares)
    smallest = order[-1]
    return [Share((*share, *[smallest] * (most - len(share))), most - len(share)) for share in shares]


def measure(batch: object) -> int:
    """Padded tokens of a micro-batch: a `SequenceBatch`, or a record that holds one."""
    if isinstance(batch, SequenceBatch):
        return batch.num_computed_tokens
    assert dataclasses.is_dataclass(batch)
    return sum(
        value.num_computed_tokens
        for field in dataclasses.fields(batch)
        if isinstance(value := getattr(batch, field.name), SequenceBatch)
    )
