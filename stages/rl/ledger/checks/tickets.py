"""Every prompt is accounted for: trained as often and when it should be, discarded, or still on its way."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from stages.rl.ledger.checks.result import CheckResult, Facts
from stages.rl.ledger.reader import RecordedUpdate
from stages.rl.ledger.schema import LedgerHeader


@dataclass
class _Ticket:
    updates: list[int] = field(default_factory=list)
    """That trained on it."""
    attempts: set[int] = field(default_factory=set)
    """That were trained on."""
    num_discarded: int = 0
    prompt_ids: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class _Place:
    """Where in the run an update lies."""

    rollout: int
    mini_batch: int
    epoch: int

    @classmethod
    def of(cls, update: int, header: LedgerHeader) -> "_Place":
        rollout, within = divmod(update, header.cycle)
        epoch, mini_batch = divmod(within, header.updates_per_rollout)
        return cls(rollout, mini_batch, epoch)


def check_tickets(facts: Facts) -> CheckResult:
    """Each ticket ends in one way; mini-batches are full and trained at their updates; no pass repeats a prompt."""
    tickets = _collect(facts)
    num_trained = sum(bool(ticket.updates) for ticket in tickets.values())
    num_discarded = sum(bool(ticket.num_discarded) for ticket in tickets.values())
    num_issued = max(tickets, default=-1) + 1
    ended = sum(bool(ticket.updates or ticket.num_discarded) for ticket in tickets.values())
    violations = [
        *(line for update in facts.ledger.updates(with_logprobs=False) for line in _check_mini_batch(update, facts)),
        *(line for number in range(num_issued) for line in _check_ending(number, tickets.get(number), facts)),
        *(line for number, ticket in sorted(tickets.items()) for line in _check_uses(number, ticket, facts)),
        *_check_passes(tickets, facts.header.num_prompts),
    ]
    counts = f"{num_issued} issued, {num_trained} trained, {num_discarded} discarded, {num_issued - ended} outstanding"
    return CheckResult("tickets", counts, tuple(violations))


def _collect(facts: Facts) -> dict[int, _Ticket]:
    tickets: dict[int, _Ticket] = {}
    for (number, _), group in facts.groups.items():
        tickets.setdefault(number, _Ticket()).prompt_ids.update(sample.prompt_id for sample in group)
    for update in facts.ledger.updates(with_logprobs=False):
        for number, attempt in update.keys:
            ticket = tickets.setdefault(number, _Ticket())
            ticket.updates.append(update.update)
            ticket.attempts.add(attempt)
    for event in facts.ledger.events:
        if event.ticket is not None:
            tickets.setdefault(event.ticket, _Ticket()).num_discarded += event.kind == "discarded"
    return tickets


def _check_mini_batch(update: RecordedUpdate, facts: Facts) -> Iterator[str]:
    header = facts.header
    place = _Place.of(update.update, header)
    for recorded in {_Place(row.rollout, row.mini_batch, row.epoch) for row in update.rows} - {place}:
        yield f"update {update.update}: is recorded as {_describe(recorded)}, but is {_describe(place)}"
    num_tickets = len({row.ticket for row in update.rows})
    if num_tickets != header.prompts_per_update:
        yield f"update {update.update}: trained on {num_tickets} tickets instead of {header.prompts_per_update}"


def _check_ending(number: int, ticket: _Ticket | None, facts: Facts) -> Iterator[str]:
    ticket = ticket or _Ticket()  # one that left no trace was being sampled when the run stopped
    if ticket.updates and ticket.num_discarded:
        yield f"ticket {number}: was trained and discarded"
    if ticket.num_discarded > 1:
        yield f"ticket {number}: was discarded {ticket.num_discarded} times"
    if facts.is_finished and not ticket.updates and not ticket.num_discarded:
        yield f"ticket {number}: is lost: the run is finished, but it was neither trained nor discarded"


def _check_uses(number: int, ticket: _Ticket, facts: Facts) -> Iterator[str]:
    if not ticket.updates:
        return
    if len(ticket.attempts) > 1:
        yield f"ticket {number}: attempts {_join(ticket.attempts)} were trained; only one may be"
    header = facts.header
    start = min(ticket.updates)
    place = _Place.of(start, header)
    first = start - place.epoch * header.updates_per_rollout
    epochs = range(header.epochs_per_rollout)
    expected = [first + epoch * header.updates_per_rollout for epoch in epochs]
    # Updates that are still to come, or that the run ends before, are not missing.
    expected = [update for update in expected if update < facts.num_updates]
    if sorted(ticket.updates) != expected:
        yield f"ticket {number}: was trained at updates {_join(ticket.updates)} instead of {_join(expected)}"


def _check_passes(tickets: dict[int, _Ticket], num_prompts: int) -> Iterator[str]:
    for number, ticket in sorted(tickets.items()):
        if len(ticket.prompt_ids) > 1:
            yield f"ticket {number}: has samples of {len(ticket.prompt_ids)} prompts: {_join(ticket.prompt_ids)}"
    uses = Counter(
        (number // num_prompts, prompt_id) for number, ticket in tickets.items() for prompt_id in ticket.prompt_ids
    )
    for (number, prompt_id), count in uses.items():
        if count > 1:
            yield f"pass {number}: prompt {prompt_id} has {count} tickets"


def _describe(place: _Place) -> str:
    return f"rollout {place.rollout} mini-batch {place.mini_batch} epoch {place.epoch}"


def _join(values: list[int] | set[int] | set[str]) -> str:
    return ", ".join(str(value) for value in sorted(values))
