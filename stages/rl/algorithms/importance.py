"""Truncated importance weights: what a token's policy-gradient term counts when an older policy sampled it.

With w = π/μ, π the learner's and μ the sampling policy's probability, and c = `max_weight`:

    token_tis:     w_it = min(c, π(a_it | x_i, a_i<t) / μ(a_it | x_i, a_i<t))
    sequence_tis:  w_it = min(c, π(a_i | x_i) / μ(a_i | x_i))                    the same for all tokens

Papers: Ionides 2008, "Truncated Importance Sampling" (the bound); Degris et al. 2012, arXiv:1205.4839 (the ratio of
the action alone, token_tis); Espeholt et al. 2018, arXiv:1802.01561 (a bounded one for stale samples). Bias: a
sequence_tis that never truncates has none, but its variance grows with the length. token_tis has little variance but
keeps the states and the outcomes of the sampling policy, as PPO's surrogate does: biased. Truncation takes from what
the learner has come to prefer. At μ = π every weight is 1.
Departures: none. Where a completion's tokens are of different versions, μ is what sampled each token, so both
ratios stay as they are written here.
Shapes: B completions, T completion tokens, right-padded.
"""

from typing import Literal, TypedDict

import torch
from torch import Tensor

from stages.common.metrics import Mean
from stages.rl.tensors import require_shape

WeightKind = Literal["none", "token_tis", "sequence_tis"]
CorrectionKind = Literal["none", "token_tis", "sequence_tis", "decoupled"]
"""decoupled is for objectives with a clip range; see policy_gradient.py."""

LARGEST_BOUND = 1e6
"""Truncates nothing in practice, and is far from overflow."""


class Correction(TypedDict):
    """Settings of `compute_importance_weights`; `**correction` passes them on."""

    kind: CorrectionKind
    max_weight: float


def compute_importance_weights(
    logprobs: Tensor, sampling_logprobs: Tensor, completion_mask: Tensor, *, kind: CorrectionKind, max_weight: float
) -> tuple[Tensor, dict[str, Mean]]:
    """Factor of each token's policy-gradient term, without gradient, and metrics. [B, T]

    It is from 0 to `max_weight`, and 0 on padding.

    Args:
        logprobs: the learner's, in nats. [B, T]
        sampling_logprobs: of the policies that sampled, in nats. [B, T]
        completion_mask: True on tokens the policy sampled, EOS included. [B, T]
        kind: which ratio; none weighs every token 1.
        max_weight: upper bound of a weight, from 1 to `LARGEST_BOUND`.

    Raises:
        ValueError: a shape differs, `max_weight` is out of its range, or the kind is decoupled, no weight
            by itself.
    """
    require_shape("sampling_logprobs", sampling_logprobs, logprobs.shape)
    require_shape("completion_mask", completion_mask, logprobs.shape)
    if kind == "decoupled":
        raise ValueError("correction kind 'decoupled' needs a clip range; allowed: none, token_tis, sequence_tis")
    if not 1 <= max_weight <= LARGEST_BOUND:
        raise ValueError(f"max_weight={max_weight}: allowed: from 1 to {LARGEST_BOUND:g}")
    log_ratios = _compute_log_ratios(logprobs.detach(), sampling_logprobs.detach(), completion_mask, kind)
    # Where exp overflows to infinity the bound cuts that too, and no gradient runs through it to become NaN.
    ratios = torch.where(completion_mask, log_ratios.exp(), 0.0)  # [B, T]
    weights = ratios.clamp(max=max_weight)
    num_tokens = completion_mask.sum()
    return weights, {
        "learner/importance_weight": Mean(weights.sum(), num_tokens),
        "learner/truncated_weight_fraction": Mean((ratios > max_weight).sum(), num_tokens),
    }


def _compute_log_ratios(
    logprobs: Tensor, sampling_logprobs: Tensor, completion_mask: Tensor, kind: WeightKind
) -> Tensor:
    if kind == "none":
        return torch.zeros_like(logprobs)
    per_token = torch.where(completion_mask, logprobs - sampling_logprobs, 0.0)  # [B, T]
    if kind == "token_tis":
        return per_token
    return per_token.sum(dim=1, keepdim=True).expand_as(logprobs)
