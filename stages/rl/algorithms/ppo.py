"""PPO: clipped ratio of each token, advantages by a value model.

Papers: Schulman et al. 2017, arXiv:1707.06347 (clip, eq. 7); Schulman et al. 2015, arXiv:1506.02438, eq. 16 (GAE); as
RLHF's Ouyang et al. 2022, arXiv:2203.02155 and Huang et al. 2024, arXiv:2403.17031. The reward of token t is
−kl_coef · kl_t, plus the score at the last token, and with V_t the value before it (V after the last is 0):

    δ_t = reward_t + γ V_{t+1} − V_t        A_t = δ_t + γ λ A_{t+1}        return_t = A_t + V_t

Advantages are whitened over the mini-batch; the value model, which starts from the reward model, or from the SFT model
where none was trained, learns
½ max((V − return)², (clip(V, V_old ± value_clip) − return)²), a mean over tokens.
Departures: the value model is a model of its own with its own optimizer. An unfinished completion's score is the
missing-EOS one and ends it like any other.
Shapes: N sampled completions; B completions, T completion tokens, right-padded.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stages.common.metrics import Mean
from stages.rl.algorithms.advantages import put_at_end, rows_by_group, whiten
from stages.rl.algorithms.kl import estimate_kl
from stages.rl.algorithms.policy_gradient import PolicyGradient
from stages.rl.algorithms.protocol import ValueLoss
from stages.rl.records import LossInputs, Rollout, Totals, Unit
from stages.rl.tensors import require_shape


@dataclass(frozen=True)
class ClippedValueLoss(ValueLoss):
    """Squared error whose improvement stops counting outside the clip range."""

    clip: float
    """In units of scores."""

    def compute_loss(self, values: Tensor, inputs: LossInputs, totals: Totals) -> tuple[Tensor, dict[str, Mean]]:
        """See `ValueLoss.compute_loss`; a mean over tokens."""
        old, returns, mask = inputs.values, inputs.returns, inputs.completion_mask
        assert old is not None
        assert returns is not None
        require_shape("values", values, mask.shape)
        clipped = old + (values - old).clamp(-self.clip, self.clip)
        errors = torch.maximum((values - returns).square(), (clipped - returns).square())
        num_tokens = mask.sum()
        is_clipped = torch.where(mask, (clipped - returns).square() > (values - returns).square(), False)
        return 0.5 * torch.where(mask, errors, 0.0).sum() / totals.num_tokens, {
            "value/clipped_fraction": Mean(is_clipped.sum(), num_tokens),
            "value/error": Mean(torch.where(mask, (values - returns).detach(), 0.0).abs().sum(), num_tokens),
        }


@dataclass(frozen=True, kw_only=True)
class Ppo(PolicyGradient):
    """Generalised advantage estimation with a value model."""

    gamma: float
    gae_lambda: float
    value_clip: float
    whiten_advantages: bool

    @property
    def value_model(self) -> ValueLoss:
        """The critic's loss."""
        return ClippedValueLoss(self.value_clip)

    def select(self, rollout: Rollout) -> tuple[list[Unit], dict[str, Mean]]:
        """Every sampled completion; the advantage of a row is its score."""
        rows = [row for members in rows_by_group(rollout) for row in members]
        return [Unit((row,), (float(rollout.scores[row]),)) for row in rows], {}

    def compute_advantages(self, inputs: LossInputs) -> tuple[LossInputs, dict[str, Mean]]:
        """Generalised advantages and returns of each token."""
        mask, values = inputs.completion_mask, inputs.values
        assert values is not None
        rewards = put_at_end(inputs.advantages[:, 0], mask)
        if self.kl_coef > 0:
            kl = estimate_kl(inputs.sampling_logprobs, inputs.reference_logprobs, mask, self.kl_estimator)
            rewards = rewards - self.kl_coef * kl
        advantages = generalised_advantages(rewards, values, mask, gamma=self.gamma, gae_lambda=self.gae_lambda)
        returns = torch.where(mask, advantages + values, 0.0)
        explained = 1 - (returns - values)[mask].var(correction=0) / returns[mask].var(correction=0).clamp(min=1e-8)
        if self.whiten_advantages:
            advantages = whiten(advantages, mask)
        return replace(inputs, advantages=advantages, returns=returns), {
            "value/mean": Mean(torch.where(mask, values, 0.0).sum(), mask.sum()),
            "value/explained_variance": Mean(explained, 1),
        }


def generalised_advantages(
    rewards: Tensor, values: Tensor, completion_mask: Tensor, *, gamma: float, gae_lambda: float
) -> Tensor:
    """GAE(γ, λ) of each token, 0 on padding. [B, T]

    Args:
        rewards: of each token. [B, T]
        values: of the state before each token. [B, T]
        completion_mask: [B, T]
        gamma: discount.
        gae_lambda: 1 trusts rewards alone, 0 the next value.
    """
    require_shape("values", values, rewards.shape)
    require_shape("completion_mask", completion_mask, rewards.shape)
    rewards, values = (torch.where(completion_mask, item, 0.0) for item in (rewards, values))
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = rewards + gamma * following - values  # [B, T]
    advantages, running = [], torch.zeros_like(values[:, 0])
    for delta in reversed(deltas.unbind(dim=1)):
        running = delta + gamma * gae_lambda * running
        advantages.append(running)
    return torch.where(completion_mask, torch.stack(advantages[::-1], dim=1), 0.0)
