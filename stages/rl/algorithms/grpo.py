"""GRPO: advantages are scores standardised within the prompt's samples, the KL is in the loss.

Paper: Shao et al. 2024, arXiv:2402.03300, eq. 3 and 4: with K samples of each prompt

    A_i = (score_i − mean) / std         loss: clipped ratio of each token, plus kl_loss_coef · k3, mean over a
                                         completion's tokens, then over completions

Dr. GRPO (Liu et al. 2025, arXiv:2503.20783): `scale: none` leaves the division out, which favours prompts whose samples
score almost alike, and `normaliser: {by: constant, tokens: ...}` a mean over tokens that favours short good and long
bad completions.
Departures: std has n − 1 and 1e-4 is added to it; a prompt whose samples score alike has advantage 0 and stays in the
batch, for the KL's sake. ρ is against the sampling policy; see policy_gradient.py.
Shapes: N sampled completions.
"""

from dataclasses import dataclass
from typing import Literal

from stages.common.metrics import Mean
from stages.rl.algorithms.advantages import group_mean, group_std, rows_by_group
from stages.rl.algorithms.policy_gradient import PolicyGradient
from stages.rl.records import Rollout, Unit

EPSILON = 1e-4


@dataclass(frozen=True, kw_only=True)
class Grpo(PolicyGradient):
    """Scores relative to the group."""

    scale: Literal["group_std", "none"]

    def select(self, rollout: Rollout) -> tuple[list[Unit], dict[str, Mean]]:
        """Every sampled completion."""
        rows = [row for members in rows_by_group(rollout) for row in members]
        scores, groups = rollout.scores[rows], rollout.groups[rows]  # [N]
        spread = group_std(scores, groups)
        advantages = scores - group_mean(scores, groups)
        if self.scale == "group_std":
            advantages = advantages / (spread + EPSILON)
        units = [Unit((row,), (value,)) for row, value in zip(rows, advantages.tolist(), strict=True)]
        groups_of_scores = [set(rollout.scores[members].tolist()) for members in rows_by_group(rollout)]
        num_tied = sum(len(found) == 1 for found in groups_of_scores)
        return units, {"learner/tied_prompts": Mean(num_tied, len(groups_of_scores))}
