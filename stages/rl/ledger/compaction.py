"""The copy of a ledger that a finished stage keeps: one file per table."""

import shutil
from pathlib import Path

import pyarrow.parquet

from stages.common.publish import staging_directory
from stages.rl.ledger.reader import read_ledger
from stages.rl.ledger.schema import SCHEMAS, Table
from stages.rl.ledger.segments import COMPRESSION, HEADER, ROLLED_BACK, Chunk, list_chunks, segment_name


def publish_ledger(source: Path, target: Path) -> None:
    """Copy a ledger, its segments joined; rolled back ones are kept as they are.

    A table without rows has no file. What is at `target` is replaced once the copy is whole.

    Raises:
        InputError: the source is missing or not readable.
    """
    read_ledger(source)
    with staging_directory(target) as staged:
        shutil.copyfile(source / HEADER, staged / HEADER)
        for table, chunks in list_chunks(source).items():
            if chunks:
                _join(chunks, table, staged)
        if (source / ROLLED_BACK).exists():
            shutil.copytree(source / ROLLED_BACK, staged / ROLLED_BACK)


def _join(chunks: list[Chunk], table: Table, directory: Path) -> None:
    schema = SCHEMAS[table]
    path = directory / segment_name(table, 0)
    with pyarrow.parquet.ParquetWriter(path, schema, compression=COMPRESSION) as writer:
        for chunk in chunks:
            rows = chunk.read(schema.names)
            writer.write_table(rows, row_group_size=len(rows))
