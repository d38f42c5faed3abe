"""Preference pairs: sampled from the SFT model and labelled by a gold scorer, or a person's own.

This is the controlled setup of Asynchronous RLHF (Noukhovitch et al. 2024, arXiv:2410.18252) after Gao et al.
2022 (arXiv:2210.10760): a gold scorer stands for people, the learned reward model sees only its labels.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from stages.common.errors import InputError
from stages.data.records import Completion

SCHEMA = pyarrow.schema(
    [
        ("prompt_id", pyarrow.string()),
        ("prompt_ids", pyarrow.list_(pyarrow.int32())),
        ("chosen_ids", pyarrow.list_(pyarrow.int32())),
        ("rejected_ids", pyarrow.list_(pyarrow.int32())),
        ("chosen_text", pyarrow.string()),
        ("rejected_text", pyarrow.string()),
        ("chosen_score", pyarrow.float64()),
        ("rejected_score", pyarrow.float64()),
    ]
)


@dataclass(frozen=True)
class TokenPair:
    """Two completions of one prompt as token ids, the chosen one preferred."""

    prompt_id: str
    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    chosen_text: str
    rejected_text: str
    chosen_score: float | None = None
    """Gold score; None where a person decided."""
    rejected_score: float | None = None


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


def write_token_pairs(path: Path, pairs: Iterable[TokenPair]) -> None:
    """Write pairs as a parquet file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([asdict(pair) for pair in pairs], schema=SCHEMA), path)


def read_token_pairs(path: Path) -> list[TokenPair]:
    """Pairs in the order they were written.

    Raises:
        InputError: the file is missing or is not such a table.
    """
    try:
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).select(SCHEMA.names).to_pylist()
    except (OSError, KeyError, pyarrow.ArrowException) as error:
        raise InputError(f"{path}: not a readable pairs file: {error}") from error
    ids = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [TokenPair(**{**row, **{name: tuple(row[name]) for name in ids}}) for row in rows]
