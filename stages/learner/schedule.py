"""Learning-rate schedules that never train an update at lr = 0."""

import math

from stages.learner.config import LearnerConfig


def compute_lr(config: LearnerConfig, update: int, total_updates: int) -> float:
    """Learning rate of one update.

    Counting from 1 and decaying towards update total + 1 keeps both ends above zero: stepping a decay that
    reaches 0 before its last batch wastes that batch, as published code of this field does.

    Args:
        config: peak, shape and warm-up.
        update: 0-based index of the update about to be made.
        total_updates: updates in the whole run.
    """
    warmup = round(config.warmup_fraction * total_updates)
    if update < warmup:
        return config.lr * (update + 1) / (warmup + 1)
    progress = (update - warmup) / (total_updates - warmup)  # 0 … below 1
    match config.schedule:
        case "constant":
            return config.lr
        case "linear":
            return config.lr * (1 - progress)
        case "cosine":
            return config.lr * 0.5 * (1 + math.cos(math.pi * progress))
