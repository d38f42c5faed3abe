"""What all policy-gradient algorithms share: off-policy correction, clipping, KL, the loss's normaliser.

Three policies can have a word on a token: π, the learner's, which has the gradient; o, the learner's before it first
trained on the mini-batch (proximal); μ, that of the generator (sampling). With A the advantage:

    no clip range:                        −w · A · log π          w from importance.py, of π/μ, without gradient
    clip range, correction none:          max(−A ρ, −A clip(ρ, 1 − low, 1 + high)),   ρ = π/μ
    clip range, correction decoupled:     the same times w,       ρ = π/o, w = min(c, o/μ) without gradient

at the level of tokens, or of sequences (ρ and w are then those of whole completions).

Papers: Williams 1992 (REINFORCE); Schulman et al. 2017, arXiv:1707.06347, eq. 7 (clip); Hilton et al. 2022,
arXiv:2110.00641, eq. 3 and Fu et al. 2025, arXiv:2505.24298, eq. 5 (decoupled); Liu et al. 2025, arXiv:2503.20783
(normalisers). Bias: only the first row, with w = 1 on samples of the learner itself or with an untruncated
sequence_tis, has the gradient of the expected reward; see importance.py for what the other weights lose.
A KL term in the loss is not weighted: of stale samples it is the KL at the states they visit.
Shapes: B completions, T completion tokens, right-padded.
"""

from dataclasses import dataclass
from typing import Literal, TypedDict

import torch
from torch import Tensor

from stages.common.metrics import Mean
from stages.rl.algorithms.importance import Correction, compute_importance_weights
from stages.rl.algorithms.kl import KlEstimator, KlLossEstimator, estimate_kl
from stages.rl.algorithms.protocol import Algorithm
from stages.rl.records import LossInputs, Predictions, Totals
from stages.rl.tensors import require_shape


class Clip(TypedDict):
    """How far the ratio to an older policy may pay."""

    low: float
    high: float


class Normaliser(TypedDict):
    """What the sum of all terms is divided by. With T_i tokens in completion i of N and T in all:

    per_sequence: each completion's by T_i, then by N. per_token: by T. constant: by N · `tokens`.
    """

    by: Literal["per_sequence", "per_token", "constant"]
    tokens: float


LARGEST_LOG_RATIO = 20.0
"""In nats; a ratio of 5e8 is far outside of any clip range, and far from overflow. Above it nothing has a gradient,
whatever the advantage's sign, and is counted as clipped."""

SUM = Normaliser(by="constant", tokens=1.0)
"""Sum over tokens, mean over completions: the policy gradient's own."""


@dataclass(frozen=True, kw_only=True)
class PolicyGradient(Algorithm):
    """Base of the algorithms that weight each token's log-probability by an advantage."""

    samples_per_prompt: int
    kl_coef: float
    """Reward lost per nat of KL to the reference."""
    kl_estimator: KlEstimator = "k1"
    """Of the KL in the reward."""
    kl_loss_coef: float = 0.0
    """Loss per nat of KL to the reference."""
    kl_loss_estimator: KlLossEstimator = "k3"
    correction: Correction
    clip: Clip | None = None
    normaliser: Normaliser
    level: Literal["token", "sequence"] = "token"
    """Of a clipped ratio."""

    @property
    def num_samples(self) -> int:
        """K, completions sampled for each prompt."""
        return self.samples_per_prompt

    @property
    def needs_reference(self) -> bool:
        """Only a KL reads the reference."""
        return self.kl_coef > 0 or (self.kl_loss_coef > 0 and not self.needs_exact_kl)

    @property
    def needs_exact_kl(self) -> bool:
        """Only as the loss's KL."""
        return self.kl_loss_coef > 0 and self.kl_loss_estimator == "exact"

    @property
    def needs_proximal(self) -> bool:
        """Only the decoupled objective tells it from the sampling policy."""
        return self.correction["kind"] == "decoupled"

    def charge_kl(self, logprobs: Tensor, inputs: LossInputs) -> Tensor:  # noqa: ARG002  some read it
        """What an algorithm's advantages lose by the learner's own, newest log-probabilities. [B, T]"""
        return torch.zeros_like(inputs.advantages)

    def compute_loss(
        self, predictions: Predictions, inputs: LossInputs, totals: Totals
    ) -> tuple[Tensor, dict[str, Mean]]:
        """See `Algorithm.compute_loss`; the unit is a completion."""
        logprobs, mask = predictions.logprobs, inputs.completion_mask
        advantages = inputs.advantages - self.charge_kl(logprobs, inputs)
        if self.clip is None:
            terms, metrics = compute_plain_terms(logprobs, advantages, inputs, self.correction)
        else:
            terms, metrics = compute_clipped_terms(
                logprobs, advantages, inputs, clip=self.clip, level=self.level, correction=self.correction
            )
        if self.kl_loss_coef > 0:
            terms = terms + self.kl_loss_coef * self._kl_of_loss(predictions, inputs)
        num_tokens = mask.sum()
        metrics["learner/advantage"] = Mean(torch.where(mask, advantages.detach(), 0.0).sum(), num_tokens)
        if self.needs_reference:
            kl = estimate_kl(logprobs.detach(), inputs.reference_logprobs, mask, "k3")
            metrics["learner/kl_k3"] = Mean(kl.sum(), num_tokens)
        return normalise(terms, mask, totals, self.normaliser), metrics

    def _kl_of_loss(self, predictions: Predictions, inputs: LossInputs) -> Tensor:
        if self.kl_loss_estimator == "exact":
            assert predictions.exact_kl is not None
            return torch.where(inputs.completion_mask, predictions.exact_kl, 0.0)
        return estimate_kl(
            predictions.logprobs, inputs.reference_logprobs, inputs.completion_mask, self.kl_loss_estimator
        )


def compute_plain_terms(
    logprobs: Tensor, advantages: Tensor, inputs: LossInputs, correction: Correction
) -> tuple[Tensor, dict[str, Mean]]:
    """REINFORCE: −w · A · log π of each token, 0 on padding; no gradient flows through w and A. [B, T]

    Args:
        logprobs: the learner's, in nats, with gradient. [B, T]
        advantages: of each token. [B, T]
        inputs: mask and sampling log-probabilities.
        correction: which w.
    """
    require_shape("advantages", advantages, logprobs.shape)
    mask = inputs.completion_mask
    weights, metrics = compute_importance_weights(logprobs, inputs.sampling_logprobs, mask, **correction)
    return torch.where(mask, -logprobs * weights.detach() * advantages.detach(), 0.0), metrics


def compute_clipped_terms(
    logprobs: Tensor,
    advantages: Tensor,
    inputs: LossInputs,
    *,
    clip: Clip,
    level: Literal["token", "sequence"],
    correction: Correction,
) -> tuple[Tensor, dict[str, Mean]]:
    """The pessimistic surrogate of each token, 0 on padding. [B, T]

    At the level of sequences all tokens of a completion must have one advantage, and a completion's term is spread
    evenly over its tokens, so that sums over tokens are sums over completions.

    Args:
        logprobs: the learner's, in nats, with gradient. [B, T]
        advantages: of each token. [B, T]
        inputs: mask, sampling and proximal log-probabilities.
        clip: the range.
        level: whether ρ is a token's or a completion's.
        correction: none: ρ = π/μ. decoupled: ρ = π/o, times the truncated o/μ.
    """
    require_shape("advantages", advantages, logprobs.shape)
    mask, is_decoupled = inputs.completion_mask, correction["kind"] == "decoupled"
    older = inputs.proximal_logprobs if is_decoupled else inputs.sampling_logprobs
    assert older is not None
    log_ratios = torch.where(mask, logprobs - older, 0.0)  # [B, T]
    if level == "sequence":
        log_ratios = log_ratios.sum(dim=1, keepdim=True).expand_as(logprobs)
    # exp must not overflow: 0 times infinity in the backward pass is NaN.
    is_cut, log_ratios = log_ratios > LARGEST_LOG_RATIO, log_ratios.clamp(max=LARGEST_LOG_RATIO)
    ratios, fixed = log_ratios.exp(), advantages.detach()
    clipped = ratios.clamp(1 - clip["low"], 1 + clip["high"])
    terms = torch.maximum(-fixed * ratios, -fixed * clipped)
    metrics: dict[str, Mean] = {}
    if is_decoupled:
        kind: Literal["token_tis", "sequence_tis"] = "token_tis" if level == "token" else "sequence_tis"
        weights, metrics = compute_importance_weights(
            older, inputs.sampling_logprobs, mask, kind=kind, max_weight=correction["max_weight"]
        )
        terms = terms * weights
    if level == "sequence":
        terms = terms / mask.sum(dim=1, keepdim=True)
    is_clipped = torch.where(mask, (-fixed * clipped > -fixed * ratios) | is_cut, False)
    num_tokens = mask.sum()
    return torch.where(mask, terms, 0.0), metrics | {
        "learner/ratio": Mean(torch.where(mask, ratios.detach(), 0.0).sum(), num_tokens),
        "learner/clipped_fraction": Mean(is_clipped.sum(), num_tokens),
    }


def normalise(terms: Tensor, completion_mask: Tensor, totals: Totals, normaliser: Normaliser) -> Tensor:
    """One micro-batch's share of the batch's loss. [B, T] -> []

    Only counts of the whole batch are divided by, or a completion's own: the shares of any split add up to the same.

    Args:
        terms: 0 on padding. [B, T]
        completion_mask: [B, T]
        totals: units are completions.
        normaliser: which count.
    """
    if normaliser["by"] == "per_token":
        return terms.sum() / totals.num_tokens
    if normaliser["by"] == "per_sequence":
        return (terms.sum(dim=1) / completion_mask.sum(dim=1)).sum() / totals.num_units
    return terms.sum() / (totals.num_units * normaliser["tokens"])


def sequence_kl(inputs: LossInputs, estimator: KlEstimator) -> Tensor:
    """KL of each whole completion by what sampled it, in nats. [B]"""
    return estimate_kl(inputs.sampling_logprobs, inputs.reference_logprobs, inputs.completion_mask, estimator).sum(
        dim=1
    )
