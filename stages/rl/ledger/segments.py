"""The ledger's parquet files: numbered, whole or absent, never changed once they are there."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from stages.common.errors import InputError
from stages.common.publish import publish_file
from stages.rl.ledger.schema import SCHEMAS, TABLES, Table

HEADER = "ledger.json"
ROLLED_BACK = "rolled_back"
COMPRESSION = "zstd"

_NAME = re.compile(r"(samples|updates|events)-(\d{6,})\.parquet")


@dataclass(frozen=True)
class Chunk:
    """A part of a segment that is read at once: what one flush wrote."""

    path: Path
    row_group: int

    def read(self, columns: Sequence[str]) -> Any:
        """A pyarrow table with these columns.

        Raises:
            InputError: the file cannot be read.
        """
        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                return file.read_row_group(self.row_group, columns=list(columns))
        except (OSError, pyarrow.ArrowException) as error:
            raise _unreadable(self.path, error) from error


def segment_name(table: Table, number: int) -> str:
    """File name of a segment."""
    return f"{table}-{number:06d}.parquet"


def segment_number(path: Path) -> int:
    """Which flush wrote it."""
    return int(path.stem.rpartition("-")[2])


def find_segments(directory: Path) -> list[Path]:
    """Segments of all tables by number; what a kill left half written is not among them."""
    found = [path for path in directory.iterdir() if _NAME.fullmatch(path.name)] if directory.is_dir() else []
    return sorted(found, key=lambda path: (segment_number(path), path.name))


def write_segment(directory: Path, table: Table, number: int, rows: Sequence[dict[str, Any]]) -> None:
    """Write one segment whole or not at all, and force it to disk."""
    target = directory / segment_name(table, number)
    assert not target.exists(), target
    staged = target.with_name(f".{target.name}.staging-{os.getpid()}")
    try:
        content = pyarrow.Table.from_pylist(rows, schema=SCHEMAS[table])
        pyarrow.parquet.write_table(content, staged, compression=COMPRESSION, row_group_size=len(rows))
        publish_file(staged, target)
    finally:
        staged.unlink(missing_ok=True)


def list_chunks(directory: Path) -> dict[Table, list[Chunk]]:
    """All parts of all segments, in the order they were written.

    Raises:
        InputError: a segment is not readable or has other columns.
    """
    chunks: dict[Table, list[Chunk]] = {table: [] for table in TABLES}
    for path in find_segments(directory):
        table = next(table for table in TABLES if path.name.startswith(table))
        chunks[table] += [Chunk(path, number) for number in range(_read_metadata(path, table).num_row_groups)]
    return chunks


def count_rows(directory: Path) -> dict[Table, int]:
    """Rows of each table.

    Raises:
        InputError: a segment is not readable or has other columns.
    """
    counts: dict[Table, int] = dict.fromkeys(TABLES, 0)
    for path in find_segments(directory):
        table = next(table for table in TABLES if path.name.startswith(table))
        counts[table] += _read_metadata(path, table).num_rows
    return counts


def _read_metadata(path: Path, table: Table) -> Any:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            metadata, schema = file.metadata, file.schema_arrow
    except (OSError, pyarrow.ArrowException) as error:
        raise _unreadable(path, error) from error
    if not schema.equals(SCHEMAS[table]):
        raise InputError(f"{path}: columns are {', '.join(schema.names)}; not those of the ledger's {table}")
    return metadata


def _unreadable(path: Path, error: Exception) -> InputError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return InputError(f"{path}: not a readable segment of a ledger: {reason}")
