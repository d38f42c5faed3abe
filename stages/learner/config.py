"""Settings of the learner, nested in the section of each step that trains."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from stages.common.config import Section
from stages.data.records import TooLong


class LearnerConfig(Section):
    """How one step's parameters are updated."""

    lr: PositiveFloat
    """Peak learning rate of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Shape of the decay after the warm-up; the last update still has lr > 0."""
    warmup_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of all updates over which lr rises from near 0."""
    weight_decay: float = Field(default=0.0, ge=0)
    """On matrices only, never on norms and biases."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this norm."""
    stop_grad_norm: PositiveFloat = 1e4
    """An unclipped gradient norm above this stops the run with its batch saved."""
    trainable_layers: PositiveInt | Literal["all"] = "all"
    """all, or only the top n transformer blocks and the norm after them."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Compute type. Weights and their optimizer state are always float32."""
    micro_batch_tokens: PositiveInt = 2048
    """Padded tokens of one forward-backward; bounds memory, changes no result beyond rounding."""
    zero_stage: Literal[1, 2, 3] = 2
    """DeepSpeed ZeRO stage; with one rank all are the same maths."""


class EpochsConfig(Section):
    """A step that trains on a fixed data set."""

    learner: LearnerConfig
    num_epochs: PositiveInt
    """Passes over the data."""
    batch_size: PositiveInt
    """Demonstrations or pairs per update."""
    max_tokens: PositiveInt
    """Prompt and completion together, in tokens."""
    too_long: TooLong = "drop"
    """What happens to longer samples; either way they are counted in the step's metrics file."""
    checkpoint_every: PositiveInt = 50
    """Updates between resume points."""
    seed: int = Field(default=0, ge=0)
    """Of everything random in the step."""
