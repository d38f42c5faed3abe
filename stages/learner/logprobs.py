"""Log-probabilities of completion tokens without holding a [B, T, vocabulary] tensor.

Shapes: B sequences, S tokens, T completion tokens, N completion tokens of the whole batch, H hidden size,
V vocabulary.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from stages.common.errors import InputError
from stages.data.batches import SequenceBatch
from stages.learner.lora import adapters_off
from stages.models.blocks import read_states
from stages.models.sharding import call_as_forward, gathered, is_shared_out
from stages.models.shared_prompts import read_shared

CHUNK = 256
"""Most rows whose logits exist at once."""
NUMBERS = CHUNK * 49_152
"""Most numbers of those logits, 48 MiB in float32: a larger vocabulary has fewer rows, not more bytes."""
TABLE_ROWS = 8192
"""Rows of the head whose gradient is added up at once."""
_KEPT = "slipstream_kept_cast"


@dataclass(frozen=True)
class _KeptCast:
    """A frozen head in the compute type, and what it was cast from: address, version, and the type."""

    state: tuple[int, int, torch.dtype]
    weight: Tensor


def compute_logprobs(model: PreTrainedModel, batch: SequenceBatch, temperature: float = 1.0) -> Tensor:
    """Log-probability of each completion token, in nats, as float32; 0 on padding.

    Args:
        model: a causal language model.
        batch: prompts and completions.
        temperature: logits are divided by it, so that the logprobs are of the distribution that was sampled.

    Returns:
        [B, T], with gradient where gradients are on.
    """
    hidden = select_predictors(model, batch)  # [N, H]
    targets = batch.completion_ids[batch.completion_mask]  # [N]
    flat = call_as_forward(model.get_output_embeddings(), _read_logprobs, hidden, targets, temperature)  # [N]
    logprobs = torch.zeros(batch.completion_mask.shape, dtype=flat.dtype, device=flat.device)
    return logprobs.masked_scatter(batch.completion_mask, flat)  # [B, T]


def select_predictors(model: PreTrainedModel, batch: SequenceBatch) -> Tensor:
    """Hidden state before each completion token: the one that predicts it. [N, H]"""
    if batch.prompts is not None:
        return read_shared(model, batch)[batch.completion_mask]
    # A cache would be for later tokens, and GPT-2's is filled again where blocks are computed twice.
    hidden = read_states(
        model, batch.trunk, 0, input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    )
    rows, columns = torch.nonzero(batch.completion_mask, as_tuple=True)
    predictors: Tensor = hidden[rows, batch.prompt_lengths[rows] + columns - 1]
    return predictors


def _read_logprobs(head: nn.Module, hidden: Tensor, targets: Tensor, temperature: float) -> Tensor:
    return gather_logprobs(hidden, _weight(head, hidden), targets, temperature)


def gather_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """log softmax(hidden @ weight.T / temperature)[targets] in float32, a chunk of rows at a time.

    Args:
        hidden: [N, H]
        weight: output embeddings. [V, H]
        targets: token ids. [N]
        temperature: above 0.

    Returns:
        [N]
    """
    if not torch.is_grad_enabled():  # a Function cannot see that, and would keep what backward needs
        hidden, weight = hidden.detach(), weight.detach()
    logprobs: Tensor = _ChunkedLogprobs.apply(hidden, weight, targets, temperature)  # type: ignore[no-untyped-call]
    return logprobs


def count_rows(vocabulary: int) -> int:
    """Rows whose logits exist at once."""
    return max(1, min(CHUNK, NUMBERS // vocabulary))


def compute_logprobs_and_kl(
    model: PreTrainedModel, reference: PreTrainedModel | None, batch: SequenceBatch, temperature: float
) -> tuple[Tensor, Tensor]:
    """`compute_logprobs`, and the exact KL(model ‖ reference) before each completion token, 0 on padding. [B, T] each

    No gradient flows through the reference; None: it is the model without its adapters.
    """
    with torch.no_grad(), nullcontext() if reference else adapters_off(model):
        other = select_predictors(reference or model, batch)  # [N, H']
    hidden = select_predictors(model, batch)  # [N, H]
    head = model.get_output_embeddings()
    other_head = reference.get_output_embeddings() if reference else head
    mask = batch.completion_mask
    targets = batch.completion_ids[mask]  # [N]
    logprobs, kl = call_as_forward(head, _read_logprobs_and_kl, hidden, other, other_head, targets, temperature)
    zeros = torch.zeros(mask.shape, dtype=kl.dtype, device=kl.device)
    return zeros.masked_scatter(mask, logprobs), zeros.masked_scatter(mask, kl)


def _read_logprobs_and_kl(
    head: nn.Module, hidden: Tensor, other: Tensor, other_head: nn.Module, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    own = _weight(head, hidden)
    logprobs = gather_logprobs(hidden, own, targets, temperature)
    weight, other_weight = _cast_like(own, hidden), _copy_cast(other_head, other)
    kl = compute_kl(hidden.to(weight.dtype), weight, other.to(other_weight.dtype), other_weight, temperature)
    return logprobs, kl


def _weight(head: nn.Module, hidden: Tensor) -> Tensor:
    """The head's matrix. A frozen one on CPU is cast once: the default model's takes 26 ms of a core, in every pass."""
    weight: Tensor = head.weight  # type: ignore[assignment]
    if weight.requires_grad or weight.is_cuda or is_shared_out(head):
        return weight
    # Loading writes into a weight, moving a model gives it other memory: then the copy is of the past.
    state = (weight.data_ptr(), weight._version, _compute_dtype(hidden))
    kept: _KeptCast | None = getattr(head, _KEPT, None)
    if kept is None or kept.state != state:
        kept = _KeptCast(state, _cast_like(weight, hidden).detach())
        setattr(head, _KEPT, kept)
    return kept.weight


def compute_kl(
    hidden: Tensor, weight: Tensor, reference_hidden: Tensor, reference_weight: Tensor, temperature: float
) -> Tensor:
    """KL(model ‖ reference) over the whole vocabulary at each position, in nats; a chunk of rows at a time.

    Args:
        hidden: the model's. [N, H]
        weight: its output embeddings. [V, H]
        reference_hidden: [N, H']
        reference_weight: [V, H']
        temperature: divides both models' logits; above 0.

    Returns:
        float32, ≥ 0, with gradient where gradients are on. [N]

    Raises:
        ValueError: the two differ in positions or vocabulary.
    """
    mine, other = (len(hidden), len(weight)), (len(reference_hidden), len(reference_weight))
    if mine != other:
        raise ValueError(f"model and reference differ in (positions, vocabulary): {mine} and {other}")
    size = count_rows(len(weight))
    parts = zip(hidden.split(size), reference_hidden.split(size), strict=True)
    # The backward pass computes a chunk's logits again instead of keeping them.
    kl = [
        checkpoint(_chunk_kl, rows, weight, reference_rows, reference_weight, temperature, use_reentrant=False)
        for rows, reference_rows in parts
    ]
    # No KL is below 0; rounding of one near 0 may be.
    return torch.cat(kl).clamp(min=0.0)


def _chunk_kl(
    rows: Tensor, weight: Tensor, reference_rows: Tensor, reference_weight: Tensor, temperature: float
) -> Tensor:
    logprobs = _log_softmax(rows, weight, temperature)  # [C, V]
    gap = logprobs - _log_softmax(reference_rows, reference_weight, temperature)  # [C, V]
    return (logprobs.exp() * gap).sum(dim=-1)


def require_plain_head(model: PreTrainedModel) -> None:
    """Refuse output heads that are more than a matrix, whose logits `gather_logprobs` would get wrong.

    Raises:
        InputError: the head has a bias, or the model caps or scales its logits.
    """
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise InputError(f"{type(model).__name__}: output heads with a bias are not supported")
    for key in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(model.config, key, None) not in (None, 1.0):
            raise InputError(f"{type(model).__name__}: {key} of the model's config is not supported")


def _copy_cast(head: nn.Module, hidden: Tensor) -> Tensor:
    """The reference's head in the compute type, to be read again in the backward pass, when shards are gone."""
    weight = _weight(head, hidden)
    if not is_shared_out(head):
        return _cast_like(weight, hidden).detach()
    with gathered(weight):  # type: ignore[arg-type]
        return _cast_like(weight, hidden).detach().clone()


def _cast_like(weight: Tensor, hidden: Tensor) -> Tensor:
    """The head in the compute type."""
    return weight.to(_compute_dtype(hidden))


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """Under autocast the hidden states are float32 after the last norm."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


class _ChunkedLogprobs(torch.autograd.Function):
    """Forward keeps d logprob / d hidden, which does not depend on the incoming gradient.

    With p = softmax(hidden @ weight.T / temperature), d logprob_n / d hidden_n = (weight[target_n] − p_n @ weight)
    / temperature: an [N, H] tensor. A frozen head (only the top layers are trained) then needs no logits in the
    backward pass at all; a trained head recomputes them chunk by chunk. Its gradient is added up in float32 in place,
    and is the only thing of the head's size that the backward pass makes.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> Tensor:
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        ctx.temperature, ctx.hidden_dtype, ctx.weight_dtype = temperature, hidden.dtype, weight.dtype
        weight = _cast_like(weight, hidden)
        compute = hidden.detach().to(weight.dtype)
        size = count_rows(len(weight))
        logprobs, slopes = [], []
        for rows, ids in zip(compute.split(size), targets.split(size), strict=True):
            log_softmax = _log_softmax(rows, weight, temperature)  # [C, V]
            logprobs.append(log_softmax.gather(1, ids[:, None]).squeeze(1))
            if needs_grad:
                expected = log_softmax.exp_().to(weight.dtype) @ weight  # [C, H]
                slopes.append((weight[ids].float() - expected.float()) / temperature)
        if needs_grad:
            ctx.save_for_backward(compute, weight, targets, torch.cat(slopes))
        return torch.cat(logprobs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        compute, weight, targets, slopes = ctx.saved_tensors
        grad_hidden = (grad[:, None] * slopes).to(ctx.hidden_dtype) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
            size = count_rows(len(weight))
            parts = zip(compute.split(size), targets.split(size), grad.split(size), strict=True)
            for rows, ids, incoming in parts:
                residual = _log_softmax(rows, weight, ctx.temperature).exp_().neg_()  # -p  [C, V]
                residual[torch.arange(len(ids)), ids] += 1
                residual *= incoming[:, None] / ctx.temperature
                _add_products(grad_weight, residual, rows)
            _round(grad_weight, weight.dtype)
            grad_weight = grad_weight.to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None


def _add_products(total: Tensor, residual: Tensor, rows: Tensor) -> None:
    """total += residual.T @ rows, some rows of the table at a time. [V, H], [C, V], [C, H]"""
    for part, columns in zip(total.split(TABLE_ROWS), residual.split(TABLE_ROWS, dim=1), strict=True):
        part += columns.to(rows.dtype).T @ rows


def _round(total: Tensor, dtype: torch.dtype) -> None:
    """To the compute type and back, in place: the gradient of a weight that was cast."""
    if dtype != total.dtype:
        for part in total.split(TABLE_ROWS):
            part.copy_(part.to(dtype))


def _log_softmax(rows: Tensor, weight: Tensor, temperature: float) -> Tensor:
    # Upcast before the softmax: differences of bf16 log-probabilities are mostly rounding.
    logits = (rows @ weight.T).float()  # [C, V]
    # Dividing by 1 would cost as much as a tenth of an update.
    return nn.functional.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)
