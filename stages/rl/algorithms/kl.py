"""Estimates of KL(policy ‖ reference) from samples of the policy, and KL as a per-token cost.

Source: J. Schulman 2020, "Approximating KL divergence" (k1, k2, k3). Of samples of the policy k1 and k3 are unbiased,
k2 is not. What counts in a loss is another thing, the gradient: that of the expected k2 is the gradient of a token's
KL, that of k1 is 0, that of k3 lies near it where the policies are close. Subtracted from the reward, without gradient,
it is k1 that gives the gradient of the KL. Shapes: B completions, T completion tokens.
"""

from typing import Literal

import torch
from torch import Tensor

KlMode = Literal["none", "one_step", "full_step"]
KlEstimator = Literal["k1", "k2", "k3"]
KlLossEstimator = Literal["k2", "k3", "exact"]


def kl_k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """log π − log π_ref of each sampled token: unbiased, of either sign. [B, T] -> [B, T]"""
    return logprobs - reference_logprobs


def kl_k2(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """½ k1²: never negative, biased. [B, T] -> [B, T]"""
    return 0.5 * (logprobs - reference_logprobs).square()


def kl_k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """exp(−k1) − 1 + k1: unbiased and never negative. [B, T] -> [B, T]"""
    k1 = logprobs - reference_logprobs
    return torch.expm1(-k1) + k1


ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


def estimate_kl(
    logprobs: Tensor, reference_logprobs: Tensor, completion_mask: Tensor, estimator: KlEstimator
) -> Tensor:
    """KL of each token, 0 on padding. [B, T]"""
    # Masked before the estimate: its gradient on padding would be 0 times whatever stands there.
    logprobs = torch.where(completion_mask, logprobs, 0.0)
    reference_logprobs = torch.where(completion_mask, reference_logprobs, 0.0)
    return ESTIMATORS[estimator](logprobs, reference_logprobs)


def kl_cost(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    completion_mask: Tensor,
    mode: KlMode,
    estimator: KlEstimator = "k1",
) -> Tensor:
    """What each token's advantage loses per unit of `kl_coef`, in nats. [B, T]

    full_step sums the estimate from the token to the completion's end: with k1 the policy gradient is then an unbiased
    gradient of the KL of whole completions. one_step takes the token's own only: less noise, but the states a token
    leads to are held fixed (ReMax, arXiv:2310.10505, appendix B, names both).
    """
    if mode == "none":
        return torch.zeros_like(reference_logprobs)
    cost = estimate_kl(logprobs.detach(), reference_logprobs, completion_mask, estimator)
    return cost if mode == "one_step" else sum_to_end(cost)


def sum_to_end(per_token: Tensor) -> Tensor:
    """Of each token, the sum from it to the end. [B, T] -> [B, T]"""
    return per_token.flip(1).cumsum(1).flip(1)
