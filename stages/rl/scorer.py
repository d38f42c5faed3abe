"""Scores of completions as the algorithms see them: the reward model's, with the missing-EOS rule."""

import math
from collections.abc import Sequence
from typing import Literal

from stages.common.errors import RunError, SettingError
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

    Greedy completions that were cut on purpose, at `greedy_max_tokens`, are scored as they are. One without a finite
    score keeps it: it is a baseline, and the algorithm that asked for it does without.

    Raises:
        RunError: a sampled completion has no finite score.
    """

    def is_cut(completion: Completion) -> bool:
        return completion.is_greedy and len(completion.token_ids) == greedy_max_tokens

    scores = [
        score if completion.is_finished or is_cut(completion) else missing_eos_score
        for completion, score in zip(completions, scorer.score(completions), strict=True)
    ]
    for completion, score in zip(completions, scores, strict=True):
        if not (math.isfinite(score) or completion.is_greedy):
            raise RunError(
                f"prompt {completion.prompt_id!r}, sample {completion.sample_index}: the reward model's score is "
                f"{score}; allowed: a finite number"
            )
    return scores
