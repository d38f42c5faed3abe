"""ReMax: REINFORCE whose baseline is the reward of the greedy completion.

Paper: Li et al. 2023, arXiv:2310.10505; the estimator, for N sampled completions a_i of prompts x_i:

    g = 1/N sum_i sum_t  grad log pi(a_it | x_i, a_i<t) * (r(x_i, a_i) - r(x_i, greedy_i) - kl_coef * kl_it)

with kl_it the k1 estimate of KL to the reference, from token t on (full_step) or of token t alone (one_step).
Departures: several samples of a prompt may share its greedy baseline; no discount (γ = 1), no reward clipping.
The term of token t is multiplied by a truncated importance weight w_it (importance.py), because an older policy may
have sampled it. The weight is on the whole advantage, KL cost included: that cost, too, is an average over samples,
of the learner's log-ratios. Samples of the learner itself have w_it = 1 but for rounding, which leaves the paper's
unbiased g. From stale samples only an untruncated sequence_tis has the same expectation. An older policy's greedy
completion adds no bias, since it does not depend on the sample.
Dividing by sampled tokens instead of N (as the authors' code does) would be biased.
Shapes: B completions, T completion tokens, right-padded.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.common.metrics import Mean
from stages.rl.algorithms.importance import Correction, compute_importance_weights
from stages.rl.algorithms.kl import KlMode, kl_cost
from stages.rl.records import LossInputs, Rollout, Unit
from stages.rl.tensors import require_shape


@dataclass(frozen=True)
class Remax:
    """Sampled minus greedy; nothing to learn besides the policy."""

    samples_per_prompt: int
    """Samples that share one greedy baseline; 1 in the paper."""
    kl_coef: float
    """Reward lost per nat of KL to the reference."""
    kl_mode: KlMode
    """Which tokens pay for a token's KL; see `kl_cost`."""
    correction: Correction
    """Importance weights of the samples of older policies."""
    with_greedy: bool = True
    needs_proximal: bool = False
    needs_value_model: bool = False

    @property
    def num_samples(self) -> int:
        """K, completions sampled for each prompt."""
        return self.samples_per_prompt

    @property
    def needs_reference(self) -> bool:
        """Only the KL cost reads the reference."""
        return self.kl_mode != "none"

    def select(self, rollout: Rollout) -> tuple[list[Unit], dict[str, Mean]]:
        """Every sampled completion, weighted by its score above the greedy one of its prompt."""
        rows = torch.nonzero(~rollout.is_greedy).squeeze(1)  # [N]
        greedy_of_group = {int(rollout.groups[row]): row for row in torch.nonzero(rollout.is_greedy).squeeze(1)}
        greedy_rows = torch.stack([greedy_of_group[int(rollout.groups[row])] for row in rows])  # [N]
        scores, greedy_scores = rollout.scores[rows], rollout.scores[greedy_rows]
        advantages = compute_advantages(scores, greedy_scores)
        metrics = {
            "remax/greedy_score": Mean(greedy_scores.sum(), len(rows)),
            "remax/sample_beats_greedy": Mean((advantages > 0).sum(), len(rows)),
            "remax/advantage_variance": Mean(advantages.var(correction=0), 1),
            "remax/score_variance": Mean(scores.var(correction=0), 1),
        }
        pairs = zip(rows.tolist(), advantages.tolist(), strict=True)
        return [Unit((row,), (advantage,)) for row, advantage in pairs], metrics

    def compute_loss(self, logprobs: Tensor, inputs: LossInputs, *, num_units: int) -> tuple[Tensor, dict[str, Mean]]:
        """See `Algorithm.compute_loss`; the unit is a completion."""
        mask = inputs.completion_mask
        cost = kl_cost(logprobs, inputs.reference_logprobs, mask, self.kl_mode)  # [B, T]
        advantages = inputs.advantages - self.kl_coef * cost
        weights, metrics = compute_importance_weights(logprobs, inputs.sampling_logprobs, mask, **self.correction)
        loss, loss_metrics = compute_loss(logprobs, advantages, weights, mask, num_completions=num_units)
        return loss, metrics | loss_metrics


def compute_advantages(scores: Tensor, greedy_scores: Tensor) -> Tensor:
    """Score of each sampled completion above its greedy one. [N], [N] -> [N]"""
    require_shape("greedy_scores", greedy_scores, scores.shape)
    return scores - greedy_scores


def compute_loss(
    logprobs: Tensor, advantages: Tensor, weights: Tensor, completion_mask: Tensor, *, num_completions: int
) -> tuple[Tensor, dict[str, Mean]]:
    """REINFORCE: −1/N Σ_i Σ_t log π(a_it) · w_it · advantage_it.

    Args:
        logprobs: the learner's, in nats, with gradient. [B, T]
        advantages: of each token; no gradient flows through them. [B, T]
        weights: of each token, 1 where the learner itself sampled; no gradient flows through them. [B, T]
        completion_mask: True on tokens the policy sampled, EOS included. [B, T]
        num_completions: N, sampled completions in the whole batch over all ranks.
    """
    require_shape("advantages", advantages, logprobs.shape)
    require_shape("weights", weights, logprobs.shape)
    require_shape("completion_mask", completion_mask, logprobs.shape)
    per_token = -logprobs * weights.detach() * advantages.detach()  # [B, T]
    loss = torch.where(completion_mask, per_token, 0.0).sum() / num_completions
    kept = torch.where(completion_mask, advantages.detach(), 0.0)
    return loss, {"learner/advantage": Mean(kept.sum(), completion_mask.sum())}
