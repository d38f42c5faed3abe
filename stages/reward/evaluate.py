"""How well the reward model predicts preferences on validation pairs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stages.common.statistics import bootstrap_interval


@dataclass(frozen=True)
class Accuracy:
    """Share of pairs whose chosen completion scores higher; a tie counts half."""

    value: float
    interval: tuple[float, float]
    """95 %, by resampling prompts."""
    num_pairs: int


def measure_accuracy(margins: Sequence[float], prompt_ids: Sequence[str], seed: int) -> Accuracy:
    """Accuracy over pairs, from the margin and the prompt of each."""
    correct = [0.5 if margin == 0 else float(margin > 0) for margin in margins]
    return Accuracy(sum(correct) / len(correct), bootstrap_interval(correct, prompt_ids, seed), len(correct))


def calibration_table(margins: Sequence[float], num_bins: int = 5) -> list[dict[str, float]]:
    """Predicted against observed: is the model right as often as σ(|margin|) says?

    Bins hold equal numbers of pairs, ordered by confidence; a row whose `accuracy` lies below its `confidence`
    is over-confident.
    """
    values = np.asarray(margins)
    confidence = 1 / (1 + np.exp(-np.abs(values)))
    correct = np.where(values == 0, 0.5, values > 0)
    bins = np.array_split(np.argsort(confidence, kind="stable"), num_bins)
    return [
        {
            "confidence": float(confidence[members].mean()),
            "accuracy": float(correct[members].mean()),
            "num_pairs": len(members),
        }
        for members in bins
        if len(members)
    ]
