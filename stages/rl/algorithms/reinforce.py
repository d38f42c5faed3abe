"""REINFORCE: the plain policy gradient, the baseline that the others are measured against.

Paper: Williams 1992, "Simple statistical gradient-following algorithms for connectionist reinforcement learning"; with
N completions a_i of prompts x_i

    g = 1/N sum_i sum_t  grad log pi(a_it | x_i, a_i<t) * (r(x_i, a_i) - b_i - kl_coef * kl_it)

b_i is 0, or the mean score of the mini-batch's *other* prompts: it does not depend on the sample, so g stays unbiased
(a mean that includes the sample would shrink it by 1/N).
Departures: as ReMax's, the KL cost is that of the learner's newest log-probabilities, from token t on (full_step) or
of token t alone (one_step); stale samples are weighted (importance.py).
Shapes: N sampled completions.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from stages.common.metrics import Mean
from stages.rl.algorithms.advantages import mean_of_other_groups, rows_by_group
from stages.rl.algorithms.kl import KlMode, kl_cost
from stages.rl.algorithms.policy_gradient import PolicyGradient
from stages.rl.records import LossInputs, Rollout, Unit


@dataclass(frozen=True, kw_only=True)
class Reinforce(PolicyGradient):
    """Scores, less the mean of other prompts' scores if asked for."""

    kl_mode: KlMode
    baseline: Literal["none", "other_prompts"]

    def select(self, rollout: Rollout) -> tuple[list[Unit], dict[str, Mean]]:
        """Every sampled completion."""
        rows = [row for members in rows_by_group(rollout) for row in members]
        scores = rollout.scores[rows]  # [N]
        if self.baseline == "other_prompts":
            scores = scores - mean_of_other_groups(scores, rollout.groups[rows])
        return [Unit((row,), (value,)) for row, value in zip(rows, scores.tolist(), strict=True)], {}

    def charge_kl(self, logprobs: Tensor, inputs: LossInputs) -> Tensor:
        """By the learner's newest log-probabilities."""
        mask, mode = inputs.completion_mask, self.kl_mode
        return self.kl_coef * kl_cost(logprobs, inputs.reference_logprobs, mask, mode, self.kl_estimator)
