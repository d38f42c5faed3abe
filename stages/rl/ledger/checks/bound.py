"""Nothing was trained that is older than the bound, and the recorded staleness is the true one."""

from collections.abc import Iterator, Mapping

from stages.rl.ledger.checks.result import CheckResult, Facts, name_sample
from stages.rl.ledger.schema import TrainedRow

FirstVersions = Mapping[tuple[int, int, int, bool], int]
"""Policy version of the first token, by ticket, attempt, sample and whether it is the greedy one."""


def check_bound(facts: Facts) -> CheckResult:
    """0 ≤ staleness ≤ bound in every trained row, and staleness = update − version of the first token."""
    bound = facts.header.max_staleness
    versions = {
        (*sample.key, sample.sample_index, sample.is_greedy): sample.versions[0]
        for group in facts.groups.values()
        for sample in group
    }
    seen: list[int] = []
    violations: list[str] = []
    num_rows = 0
    for update in facts.ledger.updates(with_logprobs=False):
        num_rows += len(update.rows)
        staleness = [row.staleness for row in update.rows]
        seen = [min([*seen, *staleness]), max([*seen, *staleness])]
        for row in update.rows:
            violations += _check_row(row, versions, bound)
    found = f"staleness {seen[0]} to {seen[1]}" if seen else "none trained"
    return CheckResult("bound", f"{num_rows} trained rows, {found}, bound {bound}", tuple(violations))


def _check_row(row: TrainedRow, versions: FirstVersions, bound: int) -> Iterator[str]:
    where = f"update {row.update}: {name_sample(row)}"
    if not 0 <= row.staleness <= bound:
        yield f"{where}: staleness {row.staleness} is outside 0 to {bound}"
    version = versions.get((*row.key, row.sample_index, row.is_greedy))
    if version is not None and row.staleness != row.update - version:
        yield f"{where}: staleness {row.staleness} is recorded, but version {version} sampled its first token"
