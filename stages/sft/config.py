"""Section `sft` of params.yaml."""

from stages.learner.config import EpochsConfig


class SftConfig(EpochsConfig):
    """Supervised fine-tuning: the loss is on completion tokens only. The seed orders the demonstrations."""
