"""A ledger as a short table for people."""

import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from stages.rl.ledger.reader import LedgerReader, RecordedUpdate
from stages.rl.ledger.schema import GroupKey, TrainedRow

NUM_PARTS = 4
"""Parts of the run whose mean scores are shown."""

SampleKey = tuple[int, int, int, bool]


@dataclass
class _Trained:
    """Counts over all updates."""

    num_updates: int = 0
    num_rows: int = 0
    num_rollouts: int = 0
    staleness: Counter[int] = field(default_factory=Counter)
    """Rows by staleness."""
    groups: set[GroupKey] = field(default_factory=set)
    chosen: set[SampleKey] = field(default_factory=set)
    """Samples that were in a loss at least once."""
    scores: list[float] = field(default_factory=list)
    """Mean of each update's samples, the greedy ones left out."""

    def add(self, update: RecordedUpdate) -> None:
        self.num_updates += 1
        self.num_rows += len(update.rows)
        self.num_rollouts = max(self.num_rollouts, *(row.rollout + 1 for row in update.rows))
        self.staleness.update(row.staleness for row in update.rows)
        self.groups.update(update.keys)
        self.chosen.update(_sample_key(row) for row in update.rows if row.unit is not None)
        # A sample of several units has several rows.
        scores = {_sample_key(row): row.score for row in update.rows if not row.is_greedy}
        self.scores.append(_mean(scores.values()))


@dataclass
class _Sampled:
    """Counts over all samples."""

    num_samples: int = 0
    num_trained: int = 0
    num_tokens: int = 0
    num_mixed: int = 0
    """Samples with tokens of more than one version."""
    attempts: dict[GroupKey, str] = field(default_factory=dict)
    """Replica that finished each."""


def summarise_ledger(ledger: LedgerReader) -> str:
    """Counts, staleness against the bound, what was thrown away, and how the score went."""
    trained = _Trained()
    for update in ledger.updates(with_logprobs=False):
        trained.add(update)
    sampled = _count_samples(ledger, trained.groups)
    header = ledger.header
    lines = [
        ("updates", f"{trained.num_updates} of {header.num_updates}"),
        ("rollouts", str(trained.num_rollouts)),
        (
            "published versions",
            str(len({event.policy_version for event in ledger.events if event.kind == "published"})),
        ),
        *_describe_samples(sampled, len(trained.chosen)),
        ("bound on staleness", str(header.max_staleness)),
        *(
            (f"  staleness {value}", _share(count, trained.num_rows))
            for value, count in sorted(trained.staleness.items())
        ),
        *_describe_events(ledger),
        *((f"attempts by {name}", str(count)) for name, count in sorted(Counter(sampled.attempts.values()).items())),
        ("rows rolled back", ", ".join(f"{count} {table}" for table, count in ledger.num_rolled_back().items())),
        *_describe_scores(trained.scores),
    ]
    return "".join(f"{name:<32}{value}\n" for name, value in lines)


def _count_samples(ledger: LedgerReader, trained: set[GroupKey]) -> _Sampled:
    counts = _Sampled()
    for sample in ledger.samples():
        counts.num_samples += 1
        counts.num_trained += sample.key in trained
        counts.num_tokens += sample.num_tokens
        counts.num_mixed += len(sample.versions) > 1
        counts.attempts[sample.key] = sample.replica
    return counts


def _describe_samples(counts: _Sampled, num_chosen: int) -> list[tuple[str, str]]:
    total = counts.num_samples
    return [
        ("samples generated", str(total)),
        ("  in a mini-batch", _share(counts.num_trained, total)),
        ("  chosen for a loss", _share(num_chosen, total)),
        ("  in no mini-batch", _share(total - counts.num_trained, total)),
        ("  of more than one version", _share(counts.num_mixed, total)),
        ("completion tokens", str(counts.num_tokens)),
    ]


def _describe_events(ledger: LedgerReader) -> list[tuple[str, str]]:
    kinds = {"lost": "attempts lost", "dropped": "attempts dropped", "discarded": "tickets discarded"}
    counts = Counter((event.kind, event.reason or "no reason") for event in ledger.events if event.kind in kinds)
    resumes = sum(event.kind == "resumed" for event in ledger.events)
    return [
        *((f"{kinds[kind]}, {reason}", str(count)) for (kind, reason), count in sorted(counts.items())),
        ("resumes", str(resumes)),
    ]


def _describe_scores(scores: list[float]) -> list[tuple[str, str]]:
    edges = [len(scores) * part // NUM_PARTS for part in range(NUM_PARTS + 1)]
    return [
        (f"mean score, updates {start} to {end - 1}", f"{_mean(scores[start:end]):.4f}")
        for start, end in itertools.pairwise(edges)
        if end > start
    ]


def _sample_key(row: TrainedRow) -> SampleKey:
    return (*row.key, row.sample_index, row.is_greedy)


def _share(count: int, total: int) -> str:
    return f"{count} ({count / total:.1%})" if total else str(count)


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else float("nan")
