"""Sections `pairs` and `reward` of params.yaml."""

from typing import Literal

from pydantic import Field

from stages.common.config import Section
from stages.data.scorers import ClassifierScorer
from stages.learner.config import EpochsConfig


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


class RewardConfig(EpochsConfig):
    """The reward model, trained from the SFT weights with the Bradley–Terry loss.

    The seed makes the scalar head, orders the pairs and resamples for the interval of the accuracy.
    """

    classifier: ClassifierScorer | None = None
    """A text classifier that takes the reward model's place; null: a model is trained."""
