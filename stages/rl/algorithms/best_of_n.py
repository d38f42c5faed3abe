"""Best-of-n: fine-tuning on the best of K samples.

Paper: as "Best-of-2 SFT" in Noukhovitch et al. 2024, arXiv:2410.18252, section 3.3; the idea is older (Dong et al.
2023, arXiv:2304.06767, RAFT). The loss is −1/N Σ_i Σ_t log π(a_it | x_i, a_i<t), a sum over tokens, over the N best.
Departures: a prompt whose samples all score alike has no best one, is left out and counted; a finished completion
always beats an unfinished one. No KL holds the policy back, and no weight: imitation has no off-policy correction.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.common.metrics import Mean
from stages.rl.algorithms.advantages import rows_by_group
from stages.rl.algorithms.online_dpo import find_pair
from stages.rl.algorithms.policy_gradient import SUM, normalise
from stages.rl.algorithms.protocol import Algorithm
from stages.rl.records import LossInputs, Predictions, Rollout, Totals, Unit


@dataclass(frozen=True, kw_only=True)
class BestOfN(Algorithm):
    """Negative log-likelihood of the best sample."""

    samples_per_prompt: int
    """K ≥ 2."""

    @property
    def num_samples(self) -> int:
        """K, completions sampled for each prompt."""
        return self.samples_per_prompt

    def select(self, rollout: Rollout) -> tuple[list[Unit], dict[str, Mean]]:
        """The best completion of each prompt."""
        members = rows_by_group(rollout)
        pairs = [pair for rows in members if (pair := find_pair(rollout, rows)) is not None]
        margins = [float(rollout.scores[best] - rollout.scores[worst]) for best, worst in pairs]
        return [Unit((best,)) for best, _ in pairs], {
            "best_of_n/tied_prompts": Mean(len(members) - len(pairs), len(members)),
            "best_of_n/score_margin": Mean(sum(margins), len(margins)),
        }

    def compute_loss(
        self, predictions: Predictions, inputs: LossInputs, totals: Totals
    ) -> tuple[Tensor, dict[str, Mean]]:
        """See `Algorithm.compute_loss`; the unit is a completion."""
        terms = torch.where(inputs.completion_mask, -predictions.logprobs, 0.0)
        return normalise(terms, inputs.completion_mask, totals, SUM), {}
