"""What an algorithm sees and what it gives back.

Shapes: B completions, T completion tokens, right-padded.
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
    """Completions that must be in one micro-batch: a single one, a pair (chosen, rejected), or a prompt's samples."""

    rows: tuple[int, ...]
    """Places in the rollout."""
    advantages: tuple[float, ...] = ()
    """One per row, from the scores alone, for algorithms that weight completions; empty for pairs."""


@dataclass(frozen=True)
class Totals:
    """Normalisers of a loss: counts of the whole batch, over all micro-batches and ranks."""

    num_units: int
    num_tokens: int
    """Completion tokens that are trained on."""


@dataclass(frozen=True)
class Predictions:
    """What the policy under training says of a micro-batch, with gradient."""

    logprobs: Tensor
    """In nats; 0 on padding. [B, T]"""
    exact_kl: Tensor | None = None
    """KL(policy ‖ reference) of each token's whole distribution, in nats; None unless the algorithm needs it. [B, T]"""


@dataclass(frozen=True)
class LossInputs:
    """The rows of some units, unit after unit: a micro-batch, or all micro-batches of an update joined."""

    completion_mask: Tensor
    """True on tokens the policy sampled, the end-of-sequence token included. [B, T]"""
    groups: Tensor
    """Of the same prompt, the same number. [B]"""
    advantages: Tensor
    """Of each token; 0 for algorithms on pairs. [B, T]"""
    sampling_logprobs: Tensor
    """The generator's, in nats. [B, T]"""
    reference_logprobs: Tensor
    """The frozen SFT model's, in nats; 0 if the algorithm needs none. [B, T]"""
    proximal_logprobs: Tensor | None = None
    """The learner's before it first trained on these tokens, in nats; None unless the algorithm needs them. [B, T]"""
    values: Tensor | None = None
    """The value model's before it first trained on these tokens; None unless the algorithm needs them. [B, T]"""
    returns: Tensor | None = None
    """What the value model is to predict; None unless the algorithm needs it. [B, T]"""
