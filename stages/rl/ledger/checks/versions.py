"""Versions only go forward: of updates, of published weights, and of the tokens of a sample."""

import itertools
from collections.abc import Iterator

from stages.rl.ledger.checks.result import CheckResult, Facts, name_sample
from stages.rl.ledger.reader import SampleFacts


def check_versions(facts: Facts) -> CheckResult:
    """Updates follow one another; tokens come from published weights, and from no newer ones than could be."""
    published_at = {0: 0}
    for event in facts.ledger.events:
        if event.kind == "published" and event.policy_version is not None:
            published_at.setdefault(event.policy_version, event.update)
    samples = [sample for group in facts.groups.values() for sample in group]
    violations = [
        *_check_updates(facts),
        *_check_published(facts),
        *(line for sample in samples for line in _check_sample(sample, published_at)),
        *_check_newest(facts, published_at),
    ]
    newest = max(published_at)
    counts = f"{facts.num_updates} updates, newest published version {newest}, {len(samples)} samples"
    return CheckResult("versions", counts, tuple(violations))


def _check_updates(facts: Facts) -> Iterator[str]:
    expected = 0
    for update in facts.ledger.updates(with_logprobs=False):
        if update.update != expected:
            yield f"update {update.update}: is recorded where update {expected} should be"
        expected = update.update + 1
    if facts.num_updates > facts.header.num_updates:
        yield f"{facts.num_updates} updates were made, but the run has {facts.header.num_updates}"


def _check_published(facts: Facts) -> Iterator[str]:
    newest = -1
    is_resuming = False  # the weights of the checkpoint are handed out again
    for event in facts.ledger.events:
        if event.kind == "resumed":
            is_resuming = True
        if event.kind != "published" or event.policy_version is None:
            continue
        if event.policy_version < newest + (0 if is_resuming else 1):
            yield f"version {event.policy_version}: was published after version {newest}"
        if event.policy_version > event.update:
            yield f"version {event.policy_version}: was published before update {event.policy_version - 1} was made"
        newest, is_resuming = event.policy_version, False


def _check_sample(sample: SampleFacts, published_at: dict[int, int]) -> Iterator[str]:
    if any(later < earlier for earlier, later in itertools.pairwise(sample.versions)):
        yield f"{name_sample(sample)}: token versions go back: {', '.join(map(str, sample.versions))}"
    unknown = sorted({version for version in sample.versions if version not in published_at})
    if unknown:
        yield f"{name_sample(sample)}: was sampled by versions that were not published: {', '.join(map(str, unknown))}"


def _check_newest(facts: Facts, published_at: dict[int, int]) -> Iterator[str]:
    for update in facts.ledger.updates(with_logprobs=False):
        for key in update.keys:
            for sample in facts.groups.get(key, []):
                newest = max(sample.versions)
                # A version that never was published is reported with the sample.
                if published_at.get(newest, 0) > update.update:
                    where = f"update {update.update}: {name_sample(sample)}"
                    yield f"{where}: has tokens of version {newest}, which was published later"
