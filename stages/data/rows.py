"""One row of a user's file, and what to do with a row whose text is unusable."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from stages.common.errors import InputError

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """The text cells of one row."""

    place: str
    """File and line (or row), 1-based, as an error names it: `pairs.jsonl, line 3`."""
    cells: Mapping[str, str]
    """Empty where there is a problem."""
    problem: str | None = None
    """Why a cell is no text at all, in the words of an error."""

    def text(self, column: str) -> str:
        """The cell of a column that must say something.

        Raises:
            InputError: the cell is empty or white space.
        """
        if not self.cells[column].strip():
            found = "only white space" if self.cells[column] else "empty"
            raise InputError(f"{self.place}: column {column!r} is {found}; expected text")
        return self.cells[column]


@dataclass(frozen=True)
class Rows:
    """The different rows of one source, in its order."""

    rows: tuple[Row, ...]
    num_rows: int
    """Rows of the source, duplicates included."""

    @property
    def num_duplicates(self) -> int:
        """Rows equal to an earlier one, which are not in `rows`."""
        return self.num_rows - len(self.rows)


def parse_rows(rows: Sequence[Row], parse: Callable[[Row], T], max_bad_rows: int) -> tuple[list[T], int]:
    """Parse every row; also count the rows that were dropped because their text is unusable.

    Collections of human data hold a few empty or contradictory rows, and editing a downloaded file
    would break its provenance; so a person may allow some, and each one is named in the log.

    Raises:
        InputError: more rows than `max_bad_rows` are bad; the message names the first.
    """
    parsed: list[T] = []
    problems: list[InputError] = []
    for row in rows:
        try:
            if row.problem is not None:
                raise InputError(row.problem)
            parsed.append(parse(row))
        except InputError as error:
            problems.append(error)
    if len(problems) > max_bad_rows:
        rest = f" (bad rows: {len(problems)}, data.task.max_bad_rows={max_bad_rows})"
        raise InputError(f"{problems[0]}{rest}") from problems[0]
    for problem in problems:
        logger.warning("dropped a bad row problem=%s", problem)
    if not parsed:
        raise InputError(f"{rows[0].place}: every row is bad, first: {problems[0]}")
    return parsed, len(problems)
