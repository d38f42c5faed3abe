"""ReMax: REINFORCE whose baseline is the reward of the greedy completion.

Paper: Li et al. 2023, arXiv:2310.10505; the estimator, for N sampled completions a_i of prompts x_i:

    g = 1/N sum_i sum_t  grad log pi(a_it | x_i, a_i<t) * (r(x_i, a_i) - r(x_i, greedy_i) - kl_coef * kl_it)

with kl_it the k1 estimate of KL to the reference, from token t on (full_step) or of token t alone (one_step).
Departures: several samples of a prompt may share its greedy baseline; no discount (γ = 1), no reward clipping.
The term of token t is multiplied by a truncated importance weight w_it (importance.py), because an older policy may
have sampled it. The weight is on the whole advantage, KL cost included: that cost, too, is an average over samples,
of the learner's log-ratios. Samples of the learner itself have w_it = 1 but for rounding, which leaves the paper's
unbiased g. From stale samples only an untruncated sequence_tis has the same expectation. An older policy's greedy
completion adds no bias, since it does not depend on the sample; nor does one that is cut short (appendix F.3).
A prompt without a greedy score gives nothing to train on, and is counted.
Dividing by sampled tokens instead of N (as the authors' code does) would be biased; `normaliser` allows it.
Shapes: N sampled completions of B in a rollout.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from stages.common.metrics import Mean
from stages.rl.algorithms.advantages import rows_by_group
from stages.rl.algorithms.kl import KlMode, kl_cost
from stages.rl.algorithms.policy_gradient import PolicyGradient
from stages.rl.records import LossInputs, Rollout, Unit
from stages.rl.tensors import require_shape


@dataclass(frozen=True, kw_only=True)
class Remax(PolicyGradient):
    """Sampled minus greedy; nothing to learn besides the policy."""

    kl_mode: KlMode
    """Which tokens pay for a token's KL; see `kl_cost`."""
    greedy_max_tokens: int | None = None
    """Where the greedy completion is cut; None: where the samples are."""

    @property
    def with_greedy(self) -> bool:
        """The baseline."""
        return True

    def select(self, rollout: Rollout) -> tuple[list[Unit], dict[str, Mean]]:
        """Every sampled completion, weighted by its score above the greedy one of its prompt."""
        greedy_score = _find_greedy_scores(rollout)
        groups = [rows for number, rows in enumerate(rows_by_group(rollout)) if number in greedy_score]
        num_groups = len(rows_by_group(rollout))
        rows = [row for members in groups for row in members]
        if not rows:
            return [], _describe(rollout.scores[:0], rollout.scores[:0], len(groups), num_groups)
        baselines = rollout.scores.new_tensor([greedy_score[int(rollout.groups[row])] for row in rows])  # [N]
        scores = rollout.scores[rows]
        advantages = compute_advantages(scores, baselines)
        metrics = _describe(scores, baselines, len(groups), num_groups)
        return [Unit((row,), (value,)) for row, value in zip(rows, advantages.tolist(), strict=True)], metrics

    def find_trouble(self, metrics: Mapping[str, Mean]) -> str | None:
        """Where the policy prefers what it samples rarely, the greedy score may add noise instead of removing it."""
        with_it, without = metrics["remax/advantage_variance"].value, metrics["remax/score_variance"].value
        if not with_it > without:
            return None
        return f"the greedy baseline adds noise: advantages vary by {with_it:.3g}, scores alone by {without:.3g}"

    def charge_kl(self, logprobs: Tensor, inputs: LossInputs) -> Tensor:
        """By the learner's newest log-probabilities: the KL that is to be lowered is the learner's."""
        mask, mode = inputs.completion_mask, self.kl_mode
        return self.kl_coef * kl_cost(logprobs, inputs.reference_logprobs, mask, mode, self.kl_estimator)


def compute_advantages(scores: Tensor, greedy_scores: Tensor) -> Tensor:
    """Score of each sampled completion above its greedy one. [N], [N] -> [N]"""
    require_shape("greedy_scores", greedy_scores, scores.shape)
    return scores - greedy_scores


def _find_greedy_scores(rollout: Rollout) -> dict[int, float]:
    """Score of the greedy completion of each prompt that has one."""
    rows = zip(rollout.groups.tolist(), rollout.is_greedy.tolist(), rollout.scores.tolist(), strict=True)
    return {group: score for group, is_greedy, score in rows if is_greedy and math.isfinite(score)}


def _describe(scores: Tensor, baselines: Tensor, num_groups: int, num_all_groups: int) -> dict[str, Mean]:
    """Whether the baseline helps: where it does, advantages vary less than scores."""
    advantages = scores - baselines
    has_any = min(1, len(scores))
    return {
        "remax/greedy_score": Mean(baselines.sum(), len(scores)),
        "remax/sample_beats_greedy": Mean((advantages > 0).sum(), len(scores)),
        "remax/advantage_variance": Mean(advantages.var(correction=0) if has_any else 0.0, has_any),
        "remax/score_variance": Mean(scores.var(correction=0) if has_any else 0.0, has_any),
        "remax/dropped_prompts": Mean(num_all_groups - num_groups, num_all_groups),
    }
