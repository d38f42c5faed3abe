"""CoPG: contrastive policy gradient, which needs no importance weight for stale samples.

Paper: Flet-Berliac et al. 2024, arXiv:2406.19185. With the regularised reward of a completion
R(a) = score(a) − β log π(a|x)/π_ref(a|x), the gradient of a pair (a, a') of one prompt, whoever sampled it, is

    (R(a) − R(a')) ∇log π(a)  +  (R(a') − R(a)) ∇log π(a')

that is −∇ of (R(a) − R(a'))² / (2β), whose minimum is the optimal policy of the KL-regularised objective. Over all
pairs of K samples the mean of the squares is twice their variance, so the loss of a prompt is Var(R)/β, with K − 1.
Departures: all pairs of K samples instead of one pair.
Shapes: B = P·K completions, the K samples of a prompt in turn; T completion tokens; P prompts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.common.metrics import Mean
from stages.rl.algorithms.advantages import rows_by_group
from stages.rl.algorithms.protocol import Algorithm
from stages.rl.records import LossInputs, Predictions, Rollout, Totals, Unit
from stages.rl.tensors import require_shape


@dataclass(frozen=True, kw_only=True)
class Copg(Algorithm):
    """Every sample of a prompt against every other."""

    samples_per_prompt: int
    """K ≥ 2."""
    beta: float
    """Reward lost per nat of KL to the reference."""

    @property
    def num_samples(self) -> int:
        """K, completions sampled for each prompt."""
        return self.samples_per_prompt

    @property
    def needs_reference(self) -> bool:
        """The regularised reward reads it."""
        return True

    def select(self, rollout: Rollout) -> tuple[list[Unit], dict[str, Mean]]:
        """All samples of each prompt together; the advantage of a row is its score."""
        units = [Unit(tuple(rows), tuple(rollout.scores[rows].tolist())) for rows in rows_by_group(rollout)]
        return units, {}

    def compute_loss(
        self, predictions: Predictions, inputs: LossInputs, totals: Totals
    ) -> tuple[Tensor, dict[str, Mean]]:
        """See `Algorithm.compute_loss`; the unit is a prompt."""
        mask = inputs.completion_mask
        log_ratios = torch.where(mask, predictions.logprobs - inputs.reference_logprobs, 0.0).sum(dim=1)  # [B]
        # All tokens of a row have its score.
        loss, regularised = compute_loss(log_ratios, inputs.advantages[:, 0], self.samples_per_prompt, self.beta)
        return loss.sum() / totals.num_units, {
            "copg/regularised_reward": Mean(regularised.detach().sum(), len(regularised)),
            "learner/kl_k1": Mean(log_ratios.detach().sum(), mask.sum()),
        }


def compute_loss(log_ratios: Tensor, scores: Tensor, samples_per_prompt: int, beta: float) -> tuple[Tensor, Tensor]:
    """Var(score − β log-ratio)/β of each prompt, and the regularised rewards. [B], [B] -> [P], [B]"""
    require_shape("scores", scores, log_ratios.shape)
    regularised = scores - beta * log_ratios
    return regularised.view(-1, samples_per_prompt).var(dim=1, correction=1) / beta, regularised
