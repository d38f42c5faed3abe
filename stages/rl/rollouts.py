"""From prompts to micro-batches: sample, score, select, look up the reference.

Shapes: B completions of a micro-batch, T completion tokens, right-padded.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stages.common.metrics import Mean
from stages.data.batches import SequenceBatch, collate, split_by_tokens
from stages.data.records import Completion
from stages.data.text import TokenSequence
from stages.generation.protocol import Group
from stages.learner.engine import compute_type
from stages.learner.logprobs import compute_logprobs
from stages.models.load import select_device
from stages.rl.algorithms.protocol import Algorithm
from stages.rl.records import LossInputs, Rollout, Unit


@dataclass(frozen=True)
class MicroBatch:
    """Token ids and what the loss needs besides the learner's log-probabilities."""

    sequences: SequenceBatch
    inputs: LossInputs


@dataclass(frozen=True)
class Reference:
    """The frozen SFT model; its log-probabilities are only computed for completions that are trained on."""

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


def build_micro_batches(
    completions: Sequence[Completion], units: Sequence[Unit], reference: Reference | None, max_tokens: int
) -> list[MicroBatch]:
    """Units of similar length together, at most `max_tokens` padded tokens each."""
    lengths = [
        len(unit.rows) * max(len(completions[row].prompt_ids) + len(completions[row].token_ids) for row in unit.rows)
        for unit in units
    ]
    return [
        _build_micro_batch(completions, [units[index] for index in group], reference)
        for group in split_by_tokens(lengths, max_tokens)
    ]


def _build_micro_batch(
    completions: Sequence[Completion], units: Sequence[Unit], reference: Reference | None
) -> MicroBatch:
    members = [completions[row] for unit in units for row in unit.rows]
    sequences = collate([TokenSequence(item.prompt_ids, item.token_ids) for item in members], select_device())
    mask = sequences.completion_mask
    sampling = torch.tensor([value for item in members for value in item.sampling_logprobs], device=mask.device)
    weights = torch.tensor([value for unit in units for value in (unit.advantages or (0.0,) * len(unit.rows))])
    zeros = torch.zeros(mask.shape, device=mask.device)
    inputs = LossInputs(
        completion_mask=mask,
        advantages=torch.where(mask, weights.to(mask.device)[:, None], zeros),
        sampling_logprobs=zeros.masked_scatter(mask, sampling),
        reference_logprobs=zeros if reference is None else reference.compute(sequences),
    )
    return MicroBatch(sequences, inputs)


def compute_loss(
    model: PreTrainedModel, batch: MicroBatch, *, algorithm: Algorithm, num_units: int, temperature: float
) -> tuple[Tensor, dict[str, Mean]]:
    """The algorithm's loss of one micro-batch, with the metrics every algorithm has."""
    logprobs = compute_logprobs(model, batch.sequences, temperature)  # [B, T]
    loss, metrics = algorithm.compute_loss(logprobs, batch.inputs, num_units=num_units)
    mask = batch.inputs.completion_mask
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
