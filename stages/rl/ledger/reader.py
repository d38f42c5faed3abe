"""Reading the ledger: the timeline that survived, a flush at a time."""

import functools
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy

from stages.common.errors import InputError
from stages.data.records import Completion
from stages.generation.protocol import Group
from stages.rl.ledger.schema import SCHEMAS, TABLES, Event, EventKind, GroupKey, LedgerHeader, Table, TrainedRow
from stages.rl.ledger.segments import HEADER, ROLLED_BACK, Chunk, count_rows, list_chunks

_LOGPROBS = ("reference_logprobs", "proximal_logprobs", "values")
_FACTS = ("ticket", "attempt", "sample_index", "is_greedy", "prompt_id", "replica")


@dataclass(frozen=True)
class RecordedUpdate:
    """Everything that one update was made of."""

    update: int
    rows: tuple[TrainedRow, ...]

    @property
    def num_units(self) -> int:
        """Units of the loss."""
        return len({row.unit for row in self.rows} - {None})

    @property
    def keys(self) -> list[GroupKey]:
        """Groups of the mini-batch, in order."""
        return list(dict.fromkeys(row.key for row in self.rows))


@dataclass(frozen=True, slots=True)
class SampleFacts:
    """What is checked and counted of a sample: all but its content."""

    ticket: int
    attempt: int
    sample_index: int
    is_greedy: bool
    prompt_id: str
    replica: str
    num_tokens: int
    versions: tuple[int, ...]
    """Policy versions of its tokens in order, repetitions left out; never empty."""

    @property
    def key(self) -> GroupKey:
        """The group it belongs to."""
        return self.ticket, self.attempt


class LedgerReader:
    """A ledger on disk. Only the events are held in memory; everything else is read when asked for."""

    def __init__(self, path: Path) -> None:
        """Use `read_ledger`."""
        self._path = path
        self._chunks = list_chunks(path)
        self.header = _read_header(path)
        self.events = tuple(_read_events(self._chunks["events"]))

    def updates(self, *, with_logprobs: bool = True) -> Iterator[RecordedUpdate]:
        """All updates in the order they were written.

        Args:
            with_logprobs: without them reading is faster, and these fields of every row are None.
        """
        skipped = () if with_logprobs else _LOGPROBS
        columns = [name for name in SCHEMAS["updates"].names if name not in skipped]
        rows = (_trained_row(row) for chunk in self._chunks["updates"] for row in chunk.read(columns).to_pylist())
        for update, members in itertools.groupby(rows, key=lambda row: row.update):
            yield RecordedUpdate(update, tuple(members))

    def samples(self) -> Iterator[SampleFacts]:
        """All samples in the order they were written, without their content."""
        for chunk in self._chunks["samples"]:
            table = chunk.read([*_FACTS, "token_policy_versions"])
            rows = table.select(_FACTS).to_pylist()
            versions = table.column("token_policy_versions").combine_chunks()
            offsets, values = versions.offsets.to_numpy(), versions.values.to_numpy()
            for row, (start, end) in zip(rows, itertools.pairwise(offsets), strict=True):
                yield SampleFacts(**row, num_tokens=int(end - start), versions=_without_repeats(values[start:end]))

    def groups(self, keys: Iterable[GroupKey]) -> dict[GroupKey, Group]:
        """The groups of these tickets and attempts: samples in order, then the greedy one.

        Raises:
            InputError: one is not recorded.
        """
        wanted = list(dict.fromkeys(keys))
        for ticket, attempt in wanted:
            if (ticket, attempt) not in self._places:
                raise InputError(f"{self._path}: has no samples of ticket {ticket} attempt {attempt}")
        found: dict[GroupKey, Group] = {}
        for chunk in dict.fromkeys(self._places[key] for key in wanted):
            found |= _read_groups(chunk, {key for key in wanted if self._places[key] == chunk})
        return {key: found[key] for key in wanted}

    def num_rolled_back(self) -> dict[Table, int]:
        """Rows of each table that do not belong to the surviving timeline."""
        counts: dict[Table, int] = dict.fromkeys(TABLES, 0)
        for directory in (self._path / ROLLED_BACK).glob("*"):
            for table, number in count_rows(directory).items():
                counts[table] += number
        return counts

    @functools.cached_property
    def _places(self) -> dict[GroupKey, Chunk]:
        return {key: chunk for chunk in self._chunks["samples"] for key in _keys(chunk.read(["ticket", "attempt"]))}


def read_ledger(path: Path) -> LedgerReader:
    """Open a ledger for reading.

    Raises:
        InputError: it is missing, not readable, or has another format.
    """
    return LedgerReader(path)


def read_groups(path: Path, keys: Iterable[GroupKey]) -> dict[GroupKey, Group]:
    """Some groups of a ledger, for a resume.

    Raises:
        InputError: the ledger is missing or not readable, or a group is not in it.
    """
    return read_ledger(path).groups(keys)


def _read_header(path: Path) -> LedgerHeader:
    try:
        return LedgerHeader.from_json(json.loads((path / HEADER).read_text(encoding="utf-8")))
    except OSError as error:
        raise InputError(f"{path}: not a ledger: {error.strerror}: {HEADER}") from error
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path / HEADER}: {error}") from error


def _read_events(chunks: Iterable[Chunk]) -> Iterator[Event]:
    for chunk in chunks:
        for row in chunk.read(SCHEMAS["events"].names).to_pylist():
            if row["kind"] not in get_args(EventKind):
                raise InputError(f"{chunk.path}: unknown kind of event {row['kind']!r}")
            yield Event(**row)


def _trained_row(row: dict[str, Any]) -> TrainedRow:
    for name in _LOGPROBS:
        if row.get(name) is not None:
            row[name] = tuple(row[name])
    return TrainedRow(**row)


def _without_repeats(versions: Any) -> tuple[int, ...]:
    changes = numpy.flatnonzero(numpy.diff(versions)) + 1
    return (int(versions[0]), *(int(version) for version in versions[changes]))


def _keys(table: Any) -> list[GroupKey]:
    return list(zip(table.column("ticket").to_pylist(), table.column("attempt").to_pylist(), strict=True))


def _read_groups(chunk: Chunk, wanted: set[GroupKey]) -> dict[GroupKey, Group]:
    table = chunk.read(SCHEMAS["samples"].names)
    rows = [number for number, key in enumerate(_keys(table)) if key in wanted]
    groups: dict[GroupKey, list[Completion]] = {}
    for row in table.take(rows).to_pylist():
        groups.setdefault((row["ticket"], row["attempt"]), []).append(_completion(row))
    return {
        key: tuple(sorted(group, key=lambda item: (item.is_greedy, item.sample_index))) for key, group in groups.items()
    }


def _completion(row: dict[str, Any]) -> Completion:
    versions = tuple(row["token_policy_versions"])
    return Completion(
        prompt_id=row["prompt_id"],
        sample_index=row["sample_index"],
        is_greedy=row["is_greedy"],
        prompt_ids=tuple(row["prompt_ids"]),
        token_ids=tuple(row["token_ids"]),
        sampling_logprobs=tuple(row["sampling_logprobs"]),
        text=row["text"],
        is_finished=row["is_finished"],
        first_policy_version=versions[0],
        last_policy_version=versions[-1],
        token_policy_versions=versions if len(set(versions)) > 1 else (),
    )
