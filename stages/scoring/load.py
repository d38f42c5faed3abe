"""What artifacts/reward holds, as a scorer: a reward model or a task's rule. Whoever scores with it comes here."""

from pathlib import Path
from typing import Literal

from stages.scoring.protocol import Scorer
from stages.scoring.rule import SCORE_RANGE, RuleScorer, is_rule


def load_scorer(path: Path, dtype: Literal["bf16", "fp32"], max_tokens: int) -> Scorer:
    """The reward model's scorer, or the rule's where stage train_reward wrote a rule.

    Args:
        path: artifacts/reward, or a directory like it.
        dtype: of a model's weights and compute; a rule has none.
        max_tokens: padded tokens of one forward pass of a model.

    Raises:
        InputError: the directory holds neither.
    """
    if is_rule(path):
        return RuleScorer(path)
    from stages.scoring.reward import RewardScorer

    return RewardScorer(path, dtype, max_tokens)


def read_score_range(path: Path) -> tuple[float, float]:
    """Lowest and highest score: those a reward model gave to SFT samples, or a rule's 0 and 1.

    Raises:
        InputError: the directory holds neither.
    """
    if is_rule(path):
        return SCORE_RANGE
    from stages.scoring.reward import read_sft_range

    return read_sft_range(path)
