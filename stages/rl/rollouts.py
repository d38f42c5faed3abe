"""From completions to micro-batches: select, look up the reference, lay out tensors.

Shapes: B completions of a micro-batch, T completion tokens, right-padded.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from stages.common.metrics import Mean
from stages.data.batches import SequenceBatch, SharedSize, collate, split_by_prompts, split_by_tokens
from stages.data.records import Completion
from stages.data.text import TokenSequence
from stages.generation.protocol import Group
from stages.learner.engine import compute_type
from stages.learner.logprobs import compute_logprobs, compute_logprobs_and_kl
from stages.learner.lora import adapters_off
from stages.learner.ranks import ALONE, Ranks
from stages.learner.trunk import read_trunks
from stages.models.load import select_device
from stages.models.sharding import call_as_forward
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
    is_without_adapters: bool = False
    """The model is the learner's, and what is meant is what it was before adapters were added."""
    trunk_depth: int = 0
    """Lower blocks that this model has in common with all that are trained, and with their reference."""

    @torch.no_grad()
    def compute(self, batch: SequenceBatch) -> Tensor:
        """Log-probability of each completion token, in nats. [B, T]"""
        adapters = adapters_off(self.model) if self.is_without_adapters else nullcontext()
        with adapters, compute_type(self.dtype, next(self.model.parameters()).device.type):
            return call_as_forward(self.model, compute_logprobs, batch, self.temperature)

    def read_trunks(self, batches: Sequence[SequenceBatch]) -> list[SequenceBatch]:
        """The batches of an update with what their passes begin with; see stages/learner/trunk.py."""
        with compute_type(self.dtype, next(self.model.parameters()).device.type):
            return read_trunks(self.model, batches, self.trunk_depth)


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
    trunk: Reference | None = None
    """Computes for each batch what they all, and the model under training, have in common."""


@dataclass(frozen=True)
class Budget:
    """How large micro-batches are, and what fills them."""

    max_tokens: int
    """Padded tokens of a micro-batch."""
    num_ranks: int = 1
    """The number of micro-batches is a multiple of it where there are units enough."""
    share_prompts: bool = False
    """A prompt is read once for all its completions in a micro-batch."""


def split_units(
    completions: Sequence[Completion],
    groups: Sequence[int],
    units: Sequence[Unit],
    reference_logprobs: Sequence[tuple[float, ...] | None],
    budget: Budget,
) -> list[list[Member]]:
    """The rows of each micro-batch: units of similar length together, or those of the same prompts.

    Args:
        completions: of the mini-batch.
        groups: ticket of each one's prompt.
        units: what is trained on together.
        reference_logprobs: of each completion, as far as they are known.
        budget: of a micro-batch.
    """
    sizes = [
        SharedSize(
            prompt=groups[unit.rows[0]],
            prompt_tokens=len(completions[unit.rows[0]].prompt_ids),
            rows=len(unit.rows),
            completion_tokens=max(len(completions[row].token_ids) for row in unit.rows),
        )
        for unit in units
    ]
    return [
        [
            Member(row, number, groups[row], completions[row], advantage, reference_logprobs[row])
            for number in numbers
            for row, advantage in _rows_of(units[number])
        ]
        for numbers in _split(sizes, budget)
    ]


def _split(sizes: Sequence[SharedSize], budget: Budget) -> list[list[int]]:
    """Numbers of the units in each micro-batch."""
    if budget.share_prompts:
        return split_by_prompts(sizes, budget.max_tokens, budget.num_ranks)
    lengths = [size.rows * (size.prompt_tokens + size.completion_tokens) for size in sizes]
    return split_by_tokens(lengths, budget.max_tokens, budget.num_ranks)


def _rows_of(unit: Unit) -> Iterator[tuple[int, float | None]]:
    yield from zip(unit.rows, unit.advantages or (None,) * len(unit.rows), strict=True)


def build_micro_batches(
    split: Sequence[Sequence[Member]], lookups: Lookups, ranks: Ranks = ALONE, *, share_prompts: bool = False
) -> list[MicroBatch]:
    """Tensors of every micro-batch; advantages are those of the scores alone.

    Args:
        split: rows of each micro-batch.
        lookups: models that fill in what rows do not bring.
        ranks: that have these models.
        share_prompts: a prompt is read once for all its completions in a micro-batch, if any has several.
    """
    prompts = [item.group for members in split for item in members]
    share_prompts = share_prompts and len(set(prompts)) < len(prompts)  # the same for all: ranks make the same calls
    batches = [
        collate(
            [TokenSequence(item.completion.prompt_ids, item.completion.token_ids) for item in members],
            select_device(),
            share_prompts=share_prompts,
        )
        for members in split
    ]
    if lookups.trunk is not None:
        batches = lookups.trunk.read_trunks(batches)
    reference = _look_up(split, batches, lambda item: item.reference_logprobs, lookups.reference, ranks)
    proximal = _look_up(split, batches, lambda item: item.proximal_logprobs, lookups.proximal, ranks)
    values = _look_up(split, batches, lambda item: item.values, lookups.value, ranks)
    return [
        _build(members, sequences, looked_up)
        for members, sequences, *looked_up in zip(split, batches, reference, proximal, values, strict=True)
    ]


def _build(members: Sequence[Member], sequences: SequenceBatch, looked_up: Sequence[Tensor | None]) -> MicroBatch:
    of_reference, of_proximal, values = looked_up
    mask = sequences.completion_mask
    advantages = torch.tensor([item.advantage or 0.0 for item in members], device=mask.device)
    inputs = LossInputs(
        completion_mask=mask,
        groups=torch.tensor([item.group for item in members], device=mask.device),
        advantages=torch.where(mask, advantages[:, None], 0.0),
        sampling_logprobs=_scatter([item.completion.sampling_logprobs for item in members], mask),
        reference_logprobs=torch.zeros(mask.shape, device=mask.device) if of_reference is None else of_reference,
        proximal_logprobs=of_proximal,
        values=values,
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


def _look_up(
    split: Sequence[Sequence[Member]],
    batches: Sequence[SequenceBatch],
    read: Callable[[Member], tuple[float, ...] | None],
    model: Reference | ValueModel | None,
    ranks: Ranks,
) -> list[Tensor | None]:
    """What the rows of each micro-batch bring, computed where some do not; None where nothing computes it."""
    found: list[Tensor | None] = []
    for members, batch in zip(split, batches, strict=True):
        known = [row for item in members if (row := read(item)) is not None]
        found.append(_scatter(known, batch.completion_mask) if len(known) == len(members) else None)
    missing = [place for place, tensor in enumerate(found) if tensor is None]
    if model is not None:
        for place, tensor in zip(missing, ranks.map(model.compute, [batches[item] for item in missing]), strict=True):
            found[place] = tensor
    return found


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
        other = None if reference.is_without_adapters else reference.model
        predictions = Predictions(*compute_logprobs_and_kl(model, other, batch.sequences, reference.temperature))
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
