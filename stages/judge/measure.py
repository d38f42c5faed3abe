"""What a model that is not being trained thinks of finished completions: logprobs and exact KL.

A model leaves behind its hidden states, from which its distributions follow. So two models can be compared
although only one of them is in memory at a time, and no [B, T, V] tensor ever exists.
Shapes: B sequences, T completion tokens, N completion tokens of a micro-batch, H hidden size, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stages.common.progress import progress
from stages.data.batches import SequenceBatch, collate, split_by_tokens
from stages.data.text import TokenSequence
from stages.learner.engine import compute_type
from stages.learner.logprobs import compute_kl, gather_logprobs, require_plain_head, select_predictors


@dataclass(frozen=True)
class Predictions:
    """All of a model's next-token distributions over some completions, not yet spelt out."""

    groups: list[list[int]]
    """Which sequences each micro-batch holds."""
    batches: list[SequenceBatch]
    hidden: list[Tensor]
    """Hidden state before each completion token of each micro-batch, in main memory. [N, H]"""
    weight: Tensor
    """Output embeddings, where the model ran. [V, H]"""


def predict_completions(
    model: PreTrainedModel,
    sequences: Sequence[TokenSequence],
    *,
    micro_batch_tokens: int,
    dtype: Literal["bf16", "fp32"],
) -> Predictions:
    """Run a model once over prompts with completions. Keeps H numbers per completion token.

    Args:
        model: a causal language model, in evaluation mode.
        sequences: each with at least one completion token.
        micro_batch_tokens: padded tokens of one forward pass.
        dtype: compute type, of the hidden states that are kept as well.

    Raises:
        InputError: the model's output head is more than a matrix.
    """
    require_plain_head(model)
    device = next(model.parameters()).device
    kept = torch.bfloat16 if dtype == "bf16" else torch.float32
    groups = split_by_tokens([len(sequence) for sequence in sequences], micro_batch_tokens)
    batches, hidden = [], []
    for group in progress(groups, "forward passes", unit="chunk"):
        batch = collate([sequences[index] for index in group], device)
        with torch.no_grad(), compute_type(dtype, device.type):
            states = select_predictors(model, batch)  # [N, H]
        batches.append(batch)
        hidden.append(states.to(kept).cpu())
    weight: Tensor = model.get_output_embeddings().weight.detach().to(kept)
    return Predictions(groups, batches, hidden, weight)


@torch.no_grad()
def sum_logprobs(predictions: Predictions, temperature: float) -> list[float]:
    """Log-probability of each completion, in nats: the sum over its tokens.

    Args:
        predictions: from `predict_completions`.
        temperature: logits are divided by it; above 0.
    """
    flat = [
        gather_logprobs(
            hidden.to(predictions.weight.device),
            predictions.weight,
            batch.completion_ids[batch.completion_mask],
            temperature,
        )
        for hidden, batch in zip(predictions.hidden, predictions.batches, strict=True)
    ]
    return _sum_by_sequence(predictions, flat)


@torch.no_grad()
def sum_kl(predictions: Predictions, reference: Predictions, temperature: float) -> list[float]:
    """Exact KL(model ‖ reference) along each completion, in nats: the sum over its positions; ≥ 0.

    Over completions sampled from the model at `temperature`, the mean is an unbiased estimate of the KL between
    the distributions over completions, with less variance than the difference of logprobs (Rao–Blackwell).

    Args:
        predictions: of the model that sampled the completions.
        reference: of the other model, over the same completions.
        temperature: divides the logits of both; above 0.

    Raises:
        ValueError: the two are not over the same sequences.
    """
    if predictions.groups != reference.groups:
        raise ValueError("predictions and reference are over different sequences or micro-batches")
    device = predictions.weight.device
    flat = [
        compute_kl(mine.to(device), predictions.weight, other.to(device), reference.weight, temperature)
        for mine, other in zip(predictions.hidden, reference.hidden, strict=True)
    ]
    return _sum_by_sequence(predictions, flat)


def _sum_by_sequence(predictions: Predictions, flat: Sequence[Tensor]) -> list[float]:
    """Values of tokens, added up for each sequence in its original place. [N] each -> one number a sequence"""
    sums = [0.0] * sum(len(group) for group in predictions.groups)
    for group, batch, values in zip(predictions.groups, predictions.batches, flat, strict=True):
        mask = batch.completion_mask
        table = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device)
        rows = table.masked_scatter(mask, values.double()).sum(dim=1)  # [B]
        for index, value in zip(group, rows.tolist(), strict=True):
            sums[index] = value
    return sums
