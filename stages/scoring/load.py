"""What artifacts/reward holds, as a scorer: a reward model, a rule or a classifier. Whoever scores comes here."""

from pathlib import Path
from typing import Literal

from stages.scoring.classifier import is_classifier, read_classifier, read_classifier_range
from stages.scoring.protocol import Scorer
from stages.scoring.rule import SCORE_RANGE, RuleScorer, is_rule


def load_scorer(path: Path, dtype: Literal["bf16", "fp32"], max_tokens: int) -> Scorer:
    """The reward model's scorer, or that of the rule or classifier which stage train_reward wrote in its place.

    Args:
        path: artifacts/reward, or a directory like it.
        dtype: of a reward model's weights and compute; a classifier computes in float32.
        max_tokens: padded tokens of one forward pass of a model.

    Raises:
        InputError: the directory holds none of them.
    """
    if is_rule(path):
        return RuleScorer(path)
    if is_classifier(path):
        return read_classifier(path)
    from stages.scoring.reward import RewardScorer

    return RewardScorer(path, dtype, max_tokens)


def read_score_range(path: Path) -> tuple[float, float]:
    """Lowest and highest score: those a reward model or a classifier gave to SFT samples, or a rule's 0 and 1.

    Raises:
        InputError: the directory holds none of them.
    """
    if is_rule(path):
        return SCORE_RANGE
    if is_classifier(path):
        return read_classifier_range(path)
    from stages.scoring.reward import read_sft_range

    return read_sft_range(path)


def holds_reward_model(path: Path) -> bool:
    """Whether it is a model that was trained here, with the policy's tokenizer."""
    return not (is_rule(path) or is_classifier(path))
