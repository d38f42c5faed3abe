"""Preference pairs: sampled from the SFT model and labelled by a gold scorer, or a person's own.

This is the controlled setup of Asynchronous RLHF (Noukhovitch et al. 2024, arXiv:2410.18252) after Gao et al.
2022 (arXiv:2210.10760): a gold scorer stands for people, the learned reward model sees only its labels.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations

from stages.data.records import Completion
from stages.data.token_pairs import TokenPair


def select_pairs(
    completions: Sequence[Completion], scores: Sequence[float], select: str
) -> tuple[list[TokenPair], int]:
    """Pairs among the completions of one prompt, and how many were dropped as ties.

    A finished completion always beats an unfinished one, whatever their scores: otherwise the reward model
    would learn from texts that were cut in the middle.

    Args:
        completions: of one prompt.
        scores: gold score of each.
        select: best_worst, nested or all (see `PairsConfig`).
    """
    ranked = sorted(
        zip(completions, scores, strict=True),
        key=lambda item: (item[0].is_finished, item[1], -item[0].sample_index),
        reverse=True,
    )
    pairs = [
        _pair(better, worse)
        for better, worse in _candidates(ranked, select)
        if (better[0].is_finished, better[1]) != (worse[0].is_finished, worse[1])
    ]
    return pairs, sum(1 for _ in _candidates(ranked, select)) - len(pairs)


Scored = tuple[Completion, float]


def _candidates(ranked: Sequence[Scored], select: str) -> Iterator[tuple[Scored, Scored]]:
    if select == "all":
        yield from combinations(ranked, 2)
        return
    depth = 1 if select == "best_worst" else len(ranked) // 2
    for place in range(depth):
        yield ranked[place], ranked[-1 - place]


def _pair(better: Scored, worse: Scored) -> TokenPair:
    (chosen, chosen_score), (rejected, rejected_score) = better, worse
    return TokenPair(
        prompt_id=chosen.prompt_id,
        prompt_ids=chosen.prompt_ids,
        chosen_ids=chosen.token_ids,
        rejected_ids=rejected.token_ids,
        chosen_text=chosen.text,
        rejected_text=rejected.text,
        chosen_score=chosen_score,
        rejected_score=rejected_score,
    )
