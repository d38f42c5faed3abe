"""From completions to micro-batches: select, look up the reference, lay out tensors.

Shapes: B completions of a micro-batch, T completion tokens, right-padded.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from stages.common.metrics import Mean
from stages.data.batches import SequenceBatch, collate, split_by_tokens
from stages.data.records import Completion
from stages.data.text import TokenSequence
from stages.generation.protocol import Group
from stages.learner.engine import compute_type
from stages.learner.logprobs import compute_logprobs, compute_logprobs_and_kl
from stages.models.load import select_device
from stages.rl.algorithms.protocol import Algorithm
from stages.rl.records import LossInputs, Predictions, Rollout, Totals, Unit
from stages.rl.value import ValueModel


@dataclass(frozen=True)
class MicroBatch:
    """Token ids and what the loss needs besides the learner's log-probabilities."""

    sequences: SequenceBatch
    inputs: LossInputs


@dataclass(frozen=True)
class Reference:
    """A model whose log-probabilities are needed without gradient: the frozen SFT model, or the learner as it is."""

    model: PreTrainedModel
    dtype: str
    temperature: float

    @torch.no_grad()
    def compute(self, batch: SequenceBatch) -> Tensor:
        """Log-probability of each completion token, in nats. [B, T]"""
        with compute_type(self.dtype, next(self.model.parameters()).device.type):
            return compute_logprobs(self.model, batch, self.temperature)


def build_rollout(groups: Sequence[Group], scores: Sequence[float]) -> Rollout:
    """Completions of all prompts and their scores as tensors."""
    completions = [completion for group in groups for completion in group]
    return Rollout(
        scores=torch.tensor(scores, dtype=torch.float32),
        is_finished=torch.tensor([item.is_finished for item in completions]),
        is_greedy=torch.tensor([item.is_greedy for item in completions]),
        groups=torch.tensor([number for number, group in enumerate(groups) for _ in group]),
    )


@dataclass(frozen=True)
class Member:
    """One row of a micro-batch."""

    row: int
    """Place among the mini-batch's completions."""
    unit: int
    """Number of the unit in the mini-batch."""
    group: int
    """Ticket of its prompt."""
    completion: Completion
    advantage: float | None
    """None for algorithms on pairs."""
    reference_logprobs: tuple[float, ...] | None = None
    """None: to be computed where the algorithm needs them."""
    proximal_logprobs: tuple[float, ...] | None = None
    values: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Lookups:
    """Frozen models that fill in what the rows do not bring; None: the algorithm does not need it."""

    reference: Reference | None = None
    proximal: Reference | None = None
    """The learner before it trains on the rows."""
    value: ValueModel | None = None


def split_units(
    completions: Sequence[Completion],
    groups: Sequence[int],
    units: Sequence[Unit],
    reference_logprobs: Sequence[tuple[float, ...] | None],
    max_tokens: int,
) -> list[list[Member]]:
    """The rows of each micro-batch: units of similar length together, at most `max_tokens` padded tokens each."""
    lengths = [
        len(unit.rows) * max(len(completions[row].prompt_ids) + len(completions[row].token_ids) for row in unit.rows)
        for unit in units
    ]
    return [
        [
            Member(row, number, groups[row], completions[row], advantage, reference_logprobs[row])
            for number in numbers
            for row, advantage in _rows_of(units[number])
        ]
        for numbers in split_by_tokens(lengths, max_tokens)
    ]


def _rows_of(unit: Unit) -> Iterator[tuple[int, float | None]]:
    yield from zip(unit.rows, unit.advantages or (None,) * len(unit.rows), strict=True)


def build_micro_batch(members: Sequence[Member], lookups: Lookups) -> MicroBatch:
    """Tensors of one micro-batch; advantages are those of the scores alone."""
    sequences = collate(
        [TokenSequence(item.completion.prompt_ids, item.completion.token_ids) for item in members], select_device()
    )
    mask = sequences.completion_mask
    advantages = torch.tensor([item.advantage or 0.0 for item in members], device=mask.device)
    of_reference = _scatter_or_compute([item.reference_logprobs for item in members], sequences, lookups.reference)
    of_proximal = _scatter_or_compute([item.proximal_logprobs for item in members], sequences, lookups.proximal)
    inputs = LossInputs(
        completion_mask=mask,
        groups=torch.tensor([item.group for item in members], device=mask.device),
        advantages=torch.where(mask, advantages[:, None], 0.0),
        sampling_logprobs=_scatter([item.completion.sampling_logprobs for item in members], mask),
        reference_logprobs=torch.zeros(mask.shape, device=mask.device) if of_reference is None else of_reference,
        proximal_logprobs=of_proximal,
        values=_scatter_or_compute([item.values for item in members], sequences, lookups.value),
    )
    return MicroBatch(sequences, inputs)


def complete_advantages(
    micro_batches: Sequence[MicroBatch], algorithm: Algorithm
) -> tuple[list[MicroBatch], dict[str, Mean]]:
    """The same micro-batches with the advantages of the whole mini-batch, and metrics."""
    joined, metrics = algorithm.compute_advantages(join_inputs([item.inputs for item in micro_batches]))
    completed, start = [], 0
    for item in micro_batches:
        num_rows, num_tokens = item.inputs.completion_mask.shape
        rows = slice(start, start + num_rows)
        returns = None if joined.returns is None else joined.returns[rows, :num_tokens]
        inputs = replace(item.inputs, advantages=joined.advantages[rows, :num_tokens], returns=returns)
        completed.append(replace(item, inputs=inputs))
        start += num_rows
    return completed, metrics


def join_inputs(parts: Sequence[LossInputs]) -> LossInputs:
    """All rows of several micro-batches, padded to the longest."""
    num_tokens = max(part.completion_mask.shape[1] for part in parts)
    joined: dict[str, Tensor | None] = {}
    for name in (field.name for field in fields(LossInputs)):
        tensors = [tensor for part in parts if (tensor := getattr(part, name)) is not None]
        padded = [item if item.ndim == 1 else pad(item, (0, num_tokens - item.shape[1])) for item in tensors]
        joined[name] = torch.cat(padded) if padded else None
    return LossInputs(**joined)  # type: ignore[arg-type]


def _scatter_or_compute(
    rows: Sequence[tuple[float, ...] | None], sequences: SequenceBatch, model: Reference | ValueModel | None
) -> Tensor | None:
    known = [row for row in rows if row is not None]
    if len(known) == len(rows):
        return _scatter(known, sequences.completion_mask)
    return None if model is None else model.compute(sequences)


def _scatter(rows: Sequence[Sequence[float]], mask: Tensor) -> Tensor:
    """One value per token, right-padded with 0. [B, T]"""
    values = torch.tensor([value for row in rows for value in row], device=mask.device)
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, values)


def compute_loss(
    model: PreTrainedModel, batch: MicroBatch, *, algorithm: Algorithm, totals: Totals, reference: Reference
) -> tuple[Tensor, dict[str, Mean]]:
    """The algorithm's loss of one micro-batch, with the metrics every algorithm has.

    Args:
        model: the learner's.
        batch: one of the update's micro-batches.
        algorithm: whose loss.
        totals: of all micro-batches.
        reference: gives the temperature, and whole distributions if the algorithm needs them.
    """
    if algorithm.needs_exact_kl:
        predictions = Predictions(
            *compute_logprobs_and_kl(model, reference.model, batch.sequences, reference.temperature)
        )
    else:
        predictions = Predictions(compute_logprobs(model, batch.sequences, reference.temperature))
    loss, metrics = algorithm.compute_loss(predictions, batch.inputs, totals)
    logprobs, mask = predictions.logprobs, batch.inputs.completion_mask
    gap = torch.where(mask, (logprobs.detach() - batch.inputs.sampling_logprobs).abs(), 0.0)
    return loss, metrics | {
        "learner/sampling_logprob_gap": Mean(gap.sum(), mask.sum()),
        "learner/entropy_estimate": Mean(-torch.where(mask, logprobs.detach(), 0.0).sum(), mask.sum()),
    }


def describe_rollout(groups: Sequence[Group], scores: Sequence[float]) -> dict[str, Mean]:
    """Metrics of the sampled completions, the greedy ones left out."""
    completions = [completion for group in groups for completion in group]
    sampled = [(item, score) for item, score in zip(completions, scores, strict=True) if not item.is_greedy]
    num = len(sampled)
    return {
        "reward/score": Mean(sum(score for _, score in sampled), num),
        "rollout/completion_tokens": Mean(sum(len(item.token_ids) for item, _ in sampled), num),
        "rollout/truncated_fraction": Mean(sum(not item.is_finished for item, _ in sampled), num),
    }
