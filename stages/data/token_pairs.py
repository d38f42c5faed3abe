"""Labelled pairs as token ids: their file, and as prompt-completion sequences within a length limit."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from stages.common.errors import InputError
from stages.data.records import TooLong
from stages.data.text import LengthReport, TokenSequence, limit_lengths

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


@dataclass(frozen=True)
class PairExample:
    """Both sides of a pair as token sequences."""

    prompt_id: str
    chosen: TokenSequence
    rejected: TokenSequence

    def __len__(self) -> int:
        return max(len(self.chosen), len(self.rejected))


def encode_pairs(
    pairs: Sequence[TokenPair], *, max_tokens: int, too_long: TooLong
) -> tuple[list[PairExample], LengthReport]:
    """Pairs within the length limit, in order; the others dropped or truncated and counted.

    Args:
        pairs: as labelled; a completion that was finished ends with its end-of-sequence token.
        max_tokens: of prompt and completion together, for either side.
        too_long: what happens to a pair with a side over it.
    """
    examples = (
        PairExample(
            pair.prompt_id,
            TokenSequence(pair.prompt_ids, pair.chosen_ids),
            TokenSequence(pair.prompt_ids, pair.rejected_ids),
        )
        for pair in pairs
    )
    return limit_lengths(
        examples,
        sequences=lambda example: [example.chosen, example.rejected],
        rebuild=lambda example, parts: PairExample(example.prompt_id, parts[0], parts[1]),
        max_tokens=max_tokens,
        too_long=too_long,
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
