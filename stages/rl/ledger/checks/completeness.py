"""What was trained can be trained again: samples, groups and micro-batches have no holes."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

from stages.rl.ledger.checks.result import CheckResult, Facts, name_sample
from stages.rl.ledger.reader import RecordedUpdate, SampleFacts
from stages.rl.ledger.schema import GroupKey, LedgerHeader, TrainedRow

Member = tuple[bool, int]
"""Of a group: whether it is the greedy one, and its sample index."""


def check_completeness(facts: Facts) -> CheckResult:
    """Trained rows have their samples, groups and micro-batches are whole, lower attempts have ended for a reason."""
    violations = [
        line for key, group in sorted(facts.groups.items()) for line in _check_group(key, group, facts.header)
    ]
    trained: set[GroupKey] = set()
    num_micro_batches = 0
    for update in facts.ledger.updates(with_logprobs=False):
        trained.update(update.keys)
        num_micro_batches += len({row.micro_batch for row in update.rows} - {None})
        violations += [*_check_rows(update, facts), *_check_units(update), *_check_places(update)]
    violations += _check_attempts(facts, trained)
    counts = f"{len(facts.groups)} groups, {len(trained)} of them trained, in {num_micro_batches} micro-batches"
    return CheckResult("completeness", counts, tuple(violations))


def _check_group(key: GroupKey, group: list[SampleFacts], header: LedgerHeader) -> Iterator[str]:
    expected: set[Member] = {(False, index) for index in range(header.samples_per_prompt)}
    if header.with_greedy:
        expected.add((True, 0))
    members = Counter((sample.is_greedy, sample.sample_index) for sample in group)
    if set(members) != expected:
        yield f"ticket {key[0]} attempt {key[1]}: has {_describe(members)} instead of {_describe(expected)}"
    for sample in group:
        count = members.pop((sample.is_greedy, sample.sample_index), 1)
        if count > 1:
            yield f"{name_sample(sample)}: is recorded {count} times"


def _check_rows(update: RecordedUpdate, facts: Facts) -> Iterator[str]:
    rows: dict[GroupKey, set[Member]] = defaultdict(set)
    for row in update.rows:
        rows[row.key].add((row.is_greedy, row.sample_index))
    for key, members in rows.items():
        recorded = {(sample.is_greedy, sample.sample_index) for sample in facts.groups.get(key, [])}
        where = f"update {update.update}: ticket {key[0]} attempt {key[1]}"
        if members - recorded:
            yield f"{where}: {_describe(members - recorded)} was trained, but is not among the samples"
        if recorded - members:
            yield f"{where}: {_describe(recorded - members)} of the group is not part of the update"


def _check_units(update: RecordedUpdate) -> Iterator[str]:
    rows = Counter((name_sample(row), row.unit) for row in update.rows)
    for (sample, unit), count in rows.items():
        if count > 1:
            yield f"update {update.update}: {sample} is in unit {unit} {count} times"
    chosen = {name_sample(row) for row in update.rows if row.unit is not None}
    for row in update.rows:
        if row.unit is None and name_sample(row) in chosen:
            yield f"update {update.update}: {name_sample(row)} is recorded as chosen and as not chosen"
    micro_batches: dict[int | None, set[int | None]] = defaultdict(set)
    for row in update.rows:
        micro_batches[row.unit].add(row.micro_batch)
    for unit, names in micro_batches.items():
        if len(names) > 1:
            yield f"update {update.update}: unit {unit} lies in {len(names)} micro-batches"


def _check_places(update: RecordedUpdate) -> Iterator[str]:
    where = f"update {update.update}"
    yield from (f"{where}: {name_sample(row)} has only a part of its place" for row in update.rows if _is_partial(row))
    chosen = [row for row in update.rows if row.unit is not None]
    if not chosen:
        yield f"{where}: no sample was chosen for the loss"
    yield from _check_numbering(f"{where}: units", {row.unit for row in chosen})
    yield from _check_numbering(f"{where}: micro-batches", {row.micro_batch for row in chosen})
    places: dict[int | None, list[int | None]] = defaultdict(list)
    for row in chosen:
        places[row.micro_batch].append(row.place)
    for micro_batch, members in places.items():
        yield from _check_numbering(f"{where}: places of micro-batch {micro_batch}", members)


def _check_numbering(what: str, numbers: Iterable[int | None]) -> Iterator[str]:
    ordered = sorted(number for number in numbers if number is not None)
    if ordered != list(range(len(ordered))):
        yield f"{what} are numbered {', '.join(map(str, ordered))} instead of 0 to {len(ordered) - 1}"


def _is_partial(row: TrainedRow) -> bool:
    return len({value is None for value in (row.unit, row.micro_batch, row.place)}) > 1


def _check_attempts(facts: Facts, trained: set[GroupKey]) -> Iterator[str]:
    events = [event for event in facts.ledger.events if event.ticket is not None and event.attempt is not None]
    failed: dict[tuple[int | None, int | None], str] = {
        (event.ticket, event.attempt): event.kind for event in events if event.kind in ("lost", "dropped")
    }
    newest: dict[int, int] = {}
    for ticket, attempt in [*facts.groups, *trained, *((event.ticket, event.attempt) for event in events)]:
        if ticket is not None and attempt is not None:
            newest[ticket] = max(newest.get(ticket, 0), attempt)
    for ticket, last in sorted(newest.items()):
        for attempt in range(last):
            if (ticket, attempt) not in failed:
                yield f"ticket {ticket} attempt {attempt}: was neither lost nor dropped, but attempt {last} followed"
    for key in sorted(trained):
        if key in failed:
            yield f"ticket {key[0]} attempt {key[1]}: was trained, but is recorded as {failed[key]}"


def _describe(members: Iterable[Member]) -> str:
    names = ["greedy" if is_greedy else f"sample {index}" for is_greedy, index in sorted(members)]
    return ", ".join(names) or "no samples"
