"""A small valid run in memory that tests change before it is written as a ledger.

Two rollouts of two mini-batches and two epochs, so U = 4; two prompts a mini-batch, three samples and a greedy one a
prompt. Tickets 4 and 5 are discarded, an attempt at ticket 6 is dropped and one at ticket 8 is lost.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from stages.data.records import Completion
from stages.rl.ledger.schema import Event, GroupKey, LedgerHeader, TrainedRow
from stages.rl.ledger.writer import Ledger

HEADER = LedgerHeader(
    max_staleness=7,
    updates_per_rollout=2,
    epochs_per_rollout=2,
    prompts_per_update=2,
    num_updates=8,
    samples_per_prompt=3,
    with_greedy=True,
    weight_update="in_flight",
    seed=5,
    num_prompts=5,
    prompts_hash="abc",
    model_hash="def",
    temperature=1.0,
)

MINI_BATCHES: dict[tuple[int, int], tuple[GroupKey, GroupKey]] = {
    (0, 0): ((0, 0), (1, 0)),
    (0, 1): ((2, 0), (3, 0)),
    (1, 0): ((6, 1), (7, 0)),
    (1, 1): ((8, 1), (9, 0)),
}
"""Tickets and attempts by rollout and mini-batch."""


@dataclass
class RecordedRun:
    header: LedgerHeader
    groups: dict[GroupKey, list[Completion]]
    updates: list[list[TrainedRow]]
    events: list[Event]

    def write(self, path: Path) -> Path:
        ledger = Ledger.open(path, self.header)
        for key, group in self.groups.items():
            ledger.add_group(*key, group, f"replica-{key[0] % 2}")
        ledger.flush()
        for rows in self.updates:
            ledger.add_update(rows)
        for event in self.events:
            ledger.add_event(event)
        ledger.flush()
        return path

    def change_row(self, update: int, row: int, **values: object) -> None:
        rows = self.updates[update]
        rows[row] = replace(rows[row], **values)  # type: ignore[arg-type]

    def change_sample(self, key: GroupKey, sample: int, **values: object) -> None:
        self.groups[key][sample] = replace(self.groups[key][sample], **values)  # type: ignore[arg-type]

    def renumber(self, old: GroupKey, new: GroupKey) -> None:
        """Train the group of another ticket or attempt."""
        for number, rows in enumerate(self.updates):
            self.updates[number] = [
                replace(row, ticket=new[0], attempt=new[1]) if row.key == old else row for row in rows
            ]

    def cut(self, num_updates: int) -> None:
        """As if it were still running."""
        del self.updates[num_updates:]
        self.events = [event for event in self.events if event.update <= num_updates]
        self.groups = {
            key: group
            for key, group in self.groups.items()
            if max(completion.last_policy_version for completion in group) <= num_updates
        }


def make_completion(ticket: int, index: int, version: int, *, greedy: bool = False, prompt: str = "") -> Completion:
    last = version + 1 if (ticket, index, greedy) == (7, 1, False) else version
    return Completion(
        prompt_id=prompt or f"prompt-{ticket % 5}",
        sample_index=index,
        is_greedy=greedy,
        prompt_ids=(1, ticket),
        token_ids=(ticket, index, 9),
        sampling_logprobs=(-0.1, -1 / 3, -1e-9 * (index + 1)),
        text=f"text {ticket} {index} ✓",
        is_finished=index != 1,
        first_policy_version=version,
        last_policy_version=last,
        token_policy_versions=(version, version, last) if last != version else (),
    )


def make_group(ticket: int, version: int) -> list[Completion]:
    samples = [make_completion(ticket, index, version) for index in range(3)]
    return [*samples, make_completion(ticket, 0, version, greedy=True)]


def make_rows(update: int, groups: dict[GroupKey, list[Completion]]) -> list[TrainedRow]:
    """Samples 0 and 1 of each group are a pair in a micro-batch of its own."""
    rollout, within = divmod(update, 4)
    epoch, mini_batch = divmod(within, 2)
    rows = []
    for unit, key in enumerate(MINI_BATCHES[rollout, mini_batch]):
        for completion in groups[key]:
            row = TrainedRow(
                update=update,
                rollout=rollout,
                mini_batch=mini_batch,
                epoch=epoch,
                ticket=key[0],
                attempt=key[1],
                sample_index=completion.sample_index,
                is_greedy=completion.is_greedy,
                score=0.1 * completion.sample_index + update,
                staleness=update - completion.first_policy_version,
            )
            place = completion.sample_index
            if not completion.is_greedy and place < 2:
                row = replace(row, unit=unit, micro_batch=unit, place=place, advantage=0.1, reference_logprobs=(-0.7,))
            rows.append(row)
    return rows


def make_run() -> RecordedRun:
    keys = [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (5, 0), (6, 0), (6, 1), (7, 0), (8, 1), (9, 0)]
    groups = {key: make_group(key[0], 0 if key[0] < 4 else 2) for key in keys}
    published = [Event("published", version, policy_version=version) for version in range(9)]
    events = [
        *published[:4],
        Event("lost", 3, ticket=8, attempt=0, reason="replica_lost"),
        Event("dropped", 3, ticket=6, attempt=0, reason="stale"),
        Event("discarded", 4, ticket=4, attempt=0, reason="no_signal"),
        Event("discarded", 4, ticket=5, attempt=0, reason="no_signal"),
        published[4],
        Event("evaluated", 4, policy_version=4, detail='{"score": 0.25}'),
        Event("resumed", 4),
        *published[4:],
    ]
    return RecordedRun(HEADER, groups, [make_rows(update, groups) for update in range(8)], events)
