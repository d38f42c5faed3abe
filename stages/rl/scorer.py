"""Scores of completions as the algorithms see them: the reward model's, with the missing-EOS rule."""

from collections.abc import Sequence
from typing import Literal

from stages.common.errors import SettingError
from stages.data.records import Completion
from stages.scoring.protocol import Scorer


def resolve_missing_eos_score(setting: float | Literal["lowest"], sft_range: tuple[float, float]) -> float:
    """The score of unfinished completions.

    Raises:
        SettingError: a number above the lowest score of SFT samples, which would reward never stopping.
    """
    lowest = sft_range[0]
    if setting == "lowest":
        return lowest
    if setting > lowest:
        raise SettingError(
            f"rl.missing_eos_score={setting} is above {lowest:.3f}, the lowest score seen on SFT samples, so an "
            "unfinished completion could beat a finished one; set it lower, or to 'lowest'"
        )
    return setting


def score_completions(
    scorer: Scorer, completions: Sequence[Completion], missing_eos_score: float, *, greedy_max_tokens: int | None = None
) -> list[float]:
    """The scorer's score of finished completions, `missing_eos_score` of the others.

    Greedy completions that were cut on purpose, at `greedy_max_tokens`, are scored as they are.
    """

    def is_cut(completion: Completion) -> bool:
        return completion.is_greedy and len(completion.token_ids) == greedy_max_tokens

    scores = scorer.score(completions)
    return [
        score if completion.is_finished or is_cut(completion) else missing_eos_score
        for completion, score in zip(completions, scores, strict=True)
    ]
