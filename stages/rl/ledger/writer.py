"""Writing the ledger: rows are collected in memory and become one segment per table at each flush."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from stages.common.errors import InputError
from stages.common.publish import sync_path, write_json
from stages.data.records import Completion
from stages.rl.ledger.schema import TABLES, Event, LedgerHeader, Table, TrainedRow
from stages.rl.ledger.segments import HEADER, ROLLED_BACK, Chunk, find_segments, segment_number, write_segment


class Ledger:
    """A ledger that is being written, by one thread of one process."""

    def __init__(self, path: Path) -> None:
        """Use `Ledger.open`."""
        self._path = path
        self._rows: dict[Table, list[dict[str, Any]]] = {table: [] for table in TABLES}
        self._next_segment = max((segment_number(segment) + 1 for segment in find_segments(path)), default=0)
        self.num_updates = 0
        """Updates it has; of one that was there before, once `roll_back_to` is called."""

    @property
    def path(self) -> Path:
        """Directory of the ledger."""
        return self._path

    @classmethod
    def open(cls, path: Path, header: LedgerHeader) -> "Ledger":
        """Start a ledger, or go on with the one that is there.

        A run that goes on must call `roll_back_to` before it adds anything.

        Raises:
            InputError: the ledger that is there has another header.
        """
        path.mkdir(parents=True, exist_ok=True)
        for leftover in path.glob(".*.staging-*"):
            leftover.unlink()
        if (path / HEADER).exists():
            require_same(path, header)
        elif find_segments(path):
            raise InputError(f"{path}: has segments of a ledger but no {HEADER}")
        else:
            write_json(path / HEADER, header.to_json())
        return cls(path)

    def add_group(self, ticket: int, attempt: int, group: Sequence[Completion], replica: str) -> None:
        """Record what one attempt at a ticket sampled, whatever becomes of it."""
        self._rows["samples"] += [_sample_row(ticket, attempt, completion, replica) for completion in group]

    def add_update(self, rows: Iterable[TrainedRow]) -> None:
        """Record one update: a row for each sample of its mini-batch, in several units one for each."""
        self._rows["updates"] += [_as_row(row) for row in rows]
        self.num_updates += 1

    def add_event(self, event: Event) -> None:
        """Record an event."""
        self._rows["events"].append(_as_row(event))

    def flush(self) -> int:
        """Force all rows to disk.

        Returns the number of the next segment: a checkpoint keeps it for `roll_back_to`.
        """
        is_written = False
        for table, rows in self._rows.items():
            if rows:
                write_segment(self._path, table, self._next_segment, rows)
                rows.clear()
                is_written = True
        self._next_segment += is_written
        return self._next_segment

    def roll_back_to(self, offset: int) -> None:
        """Move aside what was written after a checkpoint; rows that were not flushed are forgotten.

        A kill half way leaves the older ones in place, for the next call to move.

        Args:
            offset: what `flush` gave to the checkpoint; 0 where there is none.

        Raises:
            InputError: segments that the checkpoint counts on are not there, or not readable.
        """
        if offset > self._next_segment:
            raise InputError(
                f"{self._path}: ends before segment {self._next_segment}, but the checkpoint was written with "
                f"{offset} segments"
            )
        later = [segment for segment in find_segments(self._path) if segment_number(segment) >= offset]
        if later:
            _move_aside(self._path / ROLLED_BACK, later)
        for rows in self._rows.values():
            rows.clear()
        self._next_segment = offset
        self.num_updates = _count_updates(self._path)


def require_same(path: Path, header: LedgerHeader) -> None:
    """Refuse a ledger of other settings, prompts or weights.

    Raises:
        InputError: its header differs; the message names every difference.
    """
    try:
        there = json.loads((path / HEADER).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path / HEADER}: not readable as JSON: {error}") from error
    here = header.to_json()
    names = [name for name in here | there if here.get(name) != there.get(name)]
    if names:
        differences = ", ".join(f"{name} is {there.get(name)!r} there and {here.get(name)!r} here" for name in names)
        raise InputError(f"{path}: the ledger belongs to another run: {differences}")


def _count_updates(path: Path) -> int:
    segments = [segment for segment in find_segments(path) if segment.name.startswith("updates-")]
    if not segments:
        return 0
    newest = Chunk(segments[-1], row_group=0).read(["update"])
    return 1 + int(max(newest["update"].to_pylist()))


def _move_aside(directory: Path, segments: Sequence[Path]) -> None:
    directory.mkdir(exist_ok=True)
    number = sum(1 for _ in directory.iterdir())
    target = directory / str(number)
    target.mkdir()
    # The newest first: whenever a kill comes, what stays is a whole beginning of the run.
    for segment in reversed(segments):
        segment.rename(target / segment.name)
    for changed in (target, directory, directory.parent):
        sync_path(changed)


def _sample_row(ticket: int, attempt: int, completion: Completion, replica: str) -> dict[str, Any]:
    versions = completion.token_policy_versions or (completion.first_policy_version,) * len(completion.token_ids)
    assert len(versions) == len(completion.token_ids) > 0
    assert (versions[0], versions[-1]) == (completion.first_policy_version, completion.last_policy_version)
    return {
        "ticket": ticket,
        "attempt": attempt,
        "prompt_id": completion.prompt_id,
        "sample_index": completion.sample_index,
        "is_greedy": completion.is_greedy,
        "prompt_ids": completion.prompt_ids,
        "token_ids": completion.token_ids,
        "sampling_logprobs": completion.sampling_logprobs,
        "token_policy_versions": versions,
        "is_finished": completion.is_finished,
        "text": completion.text,
        "replica": replica,
    }


def _as_row(record: TrainedRow | Event) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in fields(record)}
