"""All four checks of one ledger."""

from pathlib import Path

from stages.rl.ledger.checks.bound import check_bound
from stages.rl.ledger.checks.completeness import check_completeness
from stages.rl.ledger.checks.result import CheckResult, collect_facts
from stages.rl.ledger.checks.tickets import check_tickets
from stages.rl.ledger.checks.versions import check_versions
from stages.rl.ledger.offline import read_offline_ledger
from stages.rl.ledger.reader import read_ledger

MAX_SHOWN = 20
"""Violations that are written out; the rest are counted."""


def check_ledger(path: Path) -> list[CheckResult]:
    """Check the bound, the tickets, the versions and the completeness of a ledger.

    One of an offline run has none of them to check: there is one result, without violations, that says so.

    Raises:
        InputError: the ledger is missing or not readable.
    """
    offline = read_offline_ledger(path)
    if offline is not None:
        return [CheckResult("offline", offline.describe(), ())]
    facts = collect_facts(read_ledger(path))
    return [check(facts) for check in (check_bound, check_tickets, check_versions, check_completeness)]


def format_results(results: list[CheckResult]) -> str:
    """One line per check, or per violation if there are any."""
    violations = [f"{result.name}: {line}" for result in results for line in result.violations]
    if not violations:
        return "".join(f"{result.name}: {result.counts}: ok\n" for result in results)
    lines = violations[:MAX_SHOWN]
    if len(violations) > MAX_SHOWN:
        lines.append(f"and {len(violations) - MAX_SHOWN} more violations")
    return "".join(f"{line}\n" for line in lines)
