"""Check or summarise a ledger: `python -m stages.rl.ledger check PATH`, `… summary PATH`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from stages.common.entry import EXIT_FAILED, run_entry
from stages.rl.ledger.checks.run import check_ledger, format_results
from stages.rl.ledger.offline import read_offline_ledger
from stages.rl.ledger.reader import read_ledger
from stages.rl.ledger.summary import summarise_ledger


def main(arguments: Sequence[str] | None = None) -> None:
    """Exit code 0: nothing is wrong. 1: the check found violations. 2: the ledger cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m stages.rl.ledger", description="The ledger of an RL run.")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="prove the staleness bound and account for every prompt")
    summary = commands.add_parser("summary", help="counts, staleness, what was thrown away")
    for command in (check, summary):
        command.add_argument("path", type=Path, metavar="PATH", help="directory with ledger.json")
    chosen = parser.parse_args(arguments)
    if chosen.command == "summary":
        offline = read_offline_ledger(chosen.path)
        sys.stdout.write(f"{offline.describe()}\n" if offline else summarise_ledger(read_ledger(chosen.path)))
        return
    results = check_ledger(chosen.path)
    sys.stdout.write(format_results(results))
    if any(result.violations for result in results):
        sys.exit(EXIT_FAILED)


if __name__ == "__main__":
    run_entry(main)
