"""RLOO: REINFORCE whose baseline is the mean reward of the prompt's other samples.

Papers: Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!"; Ahmadian et al. 2024, arXiv:2402.14740,
eq. 7. With K samples of each prompt and R_i = score_i − kl_coef · Σ_t kl_it, the KL of what sampled the completion:

    A_i = R_i − 1/(K−1) Σ_{j≠i} R_j         loss: −1/N Σ_i A_i Σ_t w_it log π(a_it | x_i, a_i<t)

Departures: stale samples are weighted (importance.py). The KL is of the sampling policy and so is not the newest
policy's where samples are stale.
Shapes: N sampled completions.
"""

from dataclasses import dataclass, replace

import torch

from stages.common.metrics import Mean
from stages.rl.algorithms.advantages import leave_one_out, rows_by_group
from stages.rl.algorithms.policy_gradient import PolicyGradient, sequence_kl
from stages.rl.records import LossInputs, Rollout, Unit


@dataclass(frozen=True, kw_only=True)
class Rloo(PolicyGradient):
    """Leave-one-out baseline, KL in the reward."""

    def select(self, rollout: Rollout) -> tuple[list[Unit], dict[str, Mean]]:
        """Every completion, by its score above the mean of the prompt's others."""
        return select_leave_one_out(rollout)

    def compute_advantages(self, inputs: LossInputs) -> tuple[LossInputs, dict[str, Mean]]:
        """Charge each completion its KL above the mean of the prompt's others."""
        if self.kl_coef == 0:
            return inputs, {}
        return charge_sequence_kl(inputs, self.kl_coef * sequence_kl(inputs, self.kl_estimator)), {}


def select_leave_one_out(rollout: Rollout) -> tuple[list[Unit], dict[str, Mean]]:
    """Every sampled completion, by its score above the mean of the prompt's others."""
    rows = [row for members in rows_by_group(rollout) for row in members]
    scores = rollout.scores[rows]  # [N]
    advantages = scores - leave_one_out(scores, rollout.groups[rows])
    units = [Unit((row,), (value,)) for row, value in zip(rows, advantages.tolist(), strict=True)]
    return units, {"learner/advantage_variance": Mean(advantages.var(correction=0), 1)}


def charge_sequence_kl(inputs: LossInputs, penalties: torch.Tensor) -> LossInputs:
    """Take each completion's penalty, less the mean of the prompt's others, from all its tokens' advantages. [B]"""
    charged = penalties - leave_one_out(penalties, inputs.groups)  # [B]
    advantages = torch.where(inputs.completion_mask, inputs.advantages - charged[:, None], 0.0)
    return replace(inputs, advantages=advantages)
