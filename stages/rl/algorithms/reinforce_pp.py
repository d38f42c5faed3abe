"""REINFORCE++: PPO's clip and per-token KL without a value model; advantages are whitened over the whole batch.

Paper: Hu et al. 2025, arXiv:2501.03262, eq. 3–6. Each token's reward is −kl_coef · kl_it, plus the score at the last;
its return is the sum from there on (γ = 1), and advantages are returns whitened over all tokens of the batch. With
`baseline: group_mean` (the paper's REINFORCE++-baseline) the mean score of the prompt's samples is taken away first.
Departures: the batch is the mini-batch of one update, K completions of each prompt. With either baseline the KL is
in the reward; `kl_coef: 0` and `kl_loss_coef` put it in the loss.
Shapes: N sampled completions; B completions, T completion tokens.
"""

from dataclasses import dataclass, replace
from typing import Literal

from stages.common.metrics import Mean
from stages.rl.algorithms.advantages import group_mean, rows_by_group, whiten
from stages.rl.algorithms.kl import kl_cost
from stages.rl.algorithms.policy_gradient import PolicyGradient
from stages.rl.records import LossInputs, Rollout, Unit


@dataclass(frozen=True, kw_only=True)
class ReinforcePp(PolicyGradient):
    """Whitened returns under a clipped ratio."""

    baseline: Literal["none", "group_mean"]

    def select(self, rollout: Rollout) -> tuple[list[Unit], dict[str, Mean]]:
        """Every sampled completion."""
        rows = [row for members in rows_by_group(rollout) for row in members]
        scores = rollout.scores[rows]  # [N]
        if self.baseline == "group_mean":
            scores = scores - group_mean(scores, rollout.groups[rows])
        return [Unit((row,), (value,)) for row, value in zip(rows, scores.tolist(), strict=True)], {}

    def compute_advantages(self, inputs: LossInputs) -> tuple[LossInputs, dict[str, Mean]]:
        """Returns of each token, whitened."""
        mask, returns = inputs.completion_mask, inputs.advantages
        if self.kl_coef > 0:
            cost = kl_cost(inputs.sampling_logprobs, inputs.reference_logprobs, mask, "full_step", self.kl_estimator)
            returns = returns - self.kl_coef * cost
        return replace(inputs, advantages=whiten(returns, mask)), {}
