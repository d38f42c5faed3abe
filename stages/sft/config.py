"""Section `sft` of params.yaml."""

from pydantic import Field, PositiveInt

from stages.common.config import Section
from stages.data.text import TooLong
from stages.learner.config import LearnerConfig


class SftConfig(Section):
    """Supervised fine-tuning: the loss is on completion tokens only."""

    learner: LearnerConfig
    num_epochs: PositiveInt
    """Passes over the demonstrations."""
    batch_size: PositiveInt
    """Demonstrations per update."""
    max_tokens: PositiveInt
    """Prompt and completion together, in tokens."""
    too_long: TooLong = "drop"
    """What happens to longer demonstrations; either way they are counted in metrics/sft.json."""
    checkpoint_every: PositiveInt = 50
    """Updates between resume points."""
    seed: int = Field(default=0, ge=0)
    """Order of the demonstrations."""
