"""Sections `pairs` and `reward` of params.yaml."""

from typing import Literal

from pydantic import Field, PositiveInt

from stages.common.config import Section
from stages.data.text import TooLong
from stages.learner.config import LearnerConfig


class PairsConfig(Section):
    """Preference pairs: completions of the SFT model, labelled by the task's gold scorer.

    A task with human pairs passes them through; then only a few completions are sampled, to centre scores.
    """

    samples_per_prompt: int = Field(ge=2)
    """K completions sampled for each prompt."""
    select: Literal["best_worst", "nested", "all"] = "nested"
    """best_worst: one pair a prompt. nested: also second-best vs second-worst, and so on. all: every pair."""
    relabel: bool = False
    """Let the gold scorer label a task's human pairs anew (it must have one)."""
    seed: int = Field(default=0, ge=0)
    """Of the sampling."""


class RewardConfig(Section):
    """The reward model, trained from the SFT weights with the Bradley–Terry loss."""

    learner: LearnerConfig
    num_epochs: PositiveInt
    """Passes over the pairs."""
    batch_size: PositiveInt
    """Pairs per update."""
    max_tokens: PositiveInt
    """Prompt and completion together, in tokens."""
    too_long: TooLong = "drop"
    """What happens to pairs with a longer side; either way they are counted in metrics/reward.json."""
    checkpoint_every: PositiveInt = 50
    """Updates between resume points."""
    seed: int = Field(default=0, ge=0)
    """Of the scalar head's initialisation, the order of the pairs and the bootstrap."""
