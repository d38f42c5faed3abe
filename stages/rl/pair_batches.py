"""Labelled pairs on their way to the offline learner: an order that needs no state, and micro-batches.

Shapes: B = 2P sequences with chosen and rejected in turn, T completion tokens, P pairs of a micro-batch.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from stages.common.metrics import Mean
from stages.data.batches import SequenceBatch, collate, split_by_tokens
from stages.data.seeds import derive_seed
from stages.data.token_pairs import PairExample
from stages.learner.logprobs import compute_logprobs
from stages.learner.ranks import ALONE, Ranks
from stages.models.load import select_device
from stages.rl.algorithm_config import DpoConfig
from stages.rl.algorithms.dpo import compute_pair_loss
from stages.rl.rollouts import Reference


class PairStream:
    """The pairs of each update: shuffled anew for each pass, passes end to end, none skipped or repeated in one.

    Args:
        pairs: all training pairs, at least one.
        pairs_per_update: pairs of a mini-batch; it may span two passes.
        seed: of the run.
    """

    def __init__(self, pairs: Sequence[PairExample], pairs_per_update: int, seed: int) -> None:
        self._pairs = pairs
        self._size = pairs_per_update
        self._seed = seed
        self._order: tuple[int, list[int]] = (-1, [])

    def get(self, update: int) -> list[PairExample]:
        """The mini-batch of an update, 0 being the first; the same whatever was asked for before."""
        return [self._at(place) for place in range(update * self._size, (update + 1) * self._size)]

    def _at(self, place: int) -> PairExample:
        number, index = divmod(place, len(self._pairs))
        if self._order[0] != number:
            order = list(range(len(self._pairs)))
            random.Random(derive_seed(self._seed, "pairs", number)).shuffle(order)
            self._order = (number, order)
        return self._pairs[self._order[1][index]]


@dataclass(frozen=True)
class PairBatch:
    """One micro-batch of whole pairs."""

    sequences: SequenceBatch
    """Chosen and rejected in turn. B rows"""
    reference_logprobs: Tensor
    """The frozen SFT model's, in nats. [B, T]"""


def build_pair_batches(
    pairs: Sequence[PairExample],
    reference: Reference,
    max_tokens: int,
    ranks: Ranks = ALONE,
    *,
    share_prompts: bool = False,
) -> list[PairBatch]:
    """Micro-batches of pairs of similar length.

    Args:
        pairs: of a mini-batch, or all that are evaluated.
        reference: the frozen SFT model; it sees each micro-batch as the learner will, so before the first update
            both say the same to the last bit.
        max_tokens: padded tokens of a micro-batch. A longer pair has one of its own.
        ranks: that have the reference.
        share_prompts: a pair's prompt is read once.
    """
    groups = split_by_tokens([2 * len(pair) for pair in pairs], max_tokens, ranks.size)
    batches = [_collate([pairs[index] for index in group], share_prompts) for group in groups]
    batches = reference.read_trunks(batches)
    return [PairBatch(*item) for item in zip(batches, ranks.map(reference.compute, batches), strict=True)]


def _collate(pairs: Sequence[PairExample], share_prompts: bool) -> SequenceBatch:
    sides = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
    return collate(sides, select_device(), share_prompts=share_prompts)


def compute_batch_loss(
    model: PreTrainedModel, batch: PairBatch, *, algorithm: DpoConfig, temperature: float, num_pairs: int
) -> tuple[Tensor, dict[str, Mean]]:
    """Share of the loss over `num_pairs` pairs that falls on this micro-batch, and its metrics."""
    return compute_pair_loss(
        compute_logprobs(model, batch.sequences, temperature),
        batch.reference_logprobs,
        batch.sequences.completion_mask,
        beta=algorithm.beta,
        loss=algorithm.loss,
        num_pairs=num_pairs,
    )
