"""What an algorithm sees and what it gives back.

Shapes: B completions of one update, T completion tokens, right-padded.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Rollout:
    """All completions of one update, grouped by prompt."""

    scores: Tensor
    """Of each completion, with the missing-EOS rule applied. [B]"""
    is_finished: Tensor
    """True where the completion ended with the end-of-sequence token. [B]"""
    is_greedy: Tensor
    """True on the greedy completions, which are never trained on. [B]"""
    groups: Tensor
    """Number of the prompt each completion belongs to. [B]"""


@dataclass(frozen=True)
class Unit:
    """Completions that must be in one micro-batch: a single one, or a pair (chosen, rejected)."""

    rows: tuple[int, ...]
    """Places in the rollout."""
    advantages: tuple[float, ...] = ()
    """One per row, for algorithms that weight completions; empty for pairs."""


@dataclass(frozen=True)
class LossInputs:
    """One micro-batch: the rows of some units, unit after unit."""

    completion_mask: Tensor
    """True on tokens the policy sampled, the end-of-sequence token included. [B, T]"""
    advantages: Tensor
    """Of each token, before any KL penalty; 0 for algorithms on pairs. [B, T]"""
    sampling_logprobs: Tensor
    """The generator's, in nats. [B, T]"""
    reference_logprobs: Tensor
    """The frozen SFT model's, in nats. [B, T]"""
    proximal_logprobs: Tensor | None = None
    """The learner's before it first trained on these tokens, in nats; None unless the algorithm needs them. [B, T]"""
