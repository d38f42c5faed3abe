"""What a check is given, and what it finds."""

from dataclasses import dataclass

from stages.rl.ledger.reader import LedgerReader, SampleFacts
from stages.rl.ledger.schema import GroupKey, LedgerHeader, TrainedRow


@dataclass(frozen=True)
class Facts:
    """A ledger, and what every check needs of its samples. Updates are many: each check reads them anew."""

    ledger: LedgerReader
    groups: dict[GroupKey, list[SampleFacts]]
    num_updates: int
    """Made so far."""

    @property
    def header(self) -> LedgerHeader:
        """Settings of the run."""
        return self.ledger.header

    @property
    def is_finished(self) -> bool:
        """Whether the run made all its updates."""
        return self.num_updates >= self.header.num_updates


@dataclass(frozen=True)
class CheckResult:
    """Outcome of one check."""

    name: str
    counts: str
    """How much was looked at, and what was found, in one line."""
    violations: tuple[str, ...]
    """One line each."""


def collect_facts(ledger: LedgerReader) -> Facts:
    """Read what all checks share."""
    groups: dict[GroupKey, list[SampleFacts]] = {}
    for sample in ledger.samples():
        groups.setdefault(sample.key, []).append(sample)
    num_updates = max((update.update + 1 for update in ledger.updates(with_logprobs=False)), default=0)
    return Facts(ledger, groups, num_updates)


def name_sample(sample: SampleFacts | TrainedRow) -> str:
    """How a violation calls a sample."""
    which = "greedy" if sample.is_greedy else f"sample {sample.sample_index}"
    return f"ticket {sample.ticket} attempt {sample.attempt} {which}"
