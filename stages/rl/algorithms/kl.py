"""Estimates of KL(policy ‖ reference) from samples of the policy, and KL as a per-token cost.

Source: J. Schulman 2020, "Approximating KL divergence" (k1, k2, k3). Shapes: B completions, T completion tokens.
"""

from typing import Literal

import torch
from torch import Tensor

KlMode = Literal["none", "one_step", "full_step"]


def kl_k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """log π − log π_ref of each sampled token: unbiased, of either sign. [B, T] -> [B, T]"""
    return logprobs - reference_logprobs


def kl_k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """exp(−k1) − 1 + k1: unbiased and never negative. [B, T] -> [B, T]"""
    k1 = logprobs - reference_logprobs
    return torch.expm1(-k1) + k1


def kl_cost(logprobs: Tensor, reference_logprobs: Tensor, completion_mask: Tensor, mode: KlMode) -> Tensor:
    """What each token's advantage loses per unit of `kl_coef`, in nats. [B, T]

    full_step sums k1 from the token to the completion's end: with it the policy gradient is an unbiased gradient
    of the KL of whole completions. one_step takes the token's own k1 only: less noise, but the states a token
    leads to are held fixed (ReMax, arXiv:2310.10505, appendix B, names both).
    """
    if mode == "none":
        return torch.zeros_like(reference_logprobs)
    k1 = torch.where(completion_mask, kl_k1(logprobs.detach(), reference_logprobs), 0.0)
    if mode == "one_step":
        return k1
    return k1.flip(1).cumsum(1).flip(1)
