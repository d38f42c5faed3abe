"""The tables of the two papers on this code: a grid of small RL runs, as a queue that goes on where it was.

    python bench/study.py staleness --workspace DIR --hours 3 --out docs/benchmarks/2026-11-21-study-staleness.json
    python bench/study.py staleness --out docs/benchmarks/2026-11-21-study-staleness.json --table --figure

`make study STUDY=staleness HOURS=3 WORKSPACE=DIR` calls the first. The studies are staleness, sizes, samples,
asynchronous and remax; study_grids.py lists their cells and settings. Everything up to the reward model runs once a
policy size, in DIR/base-SIZE-COMMIT-SETTINGS, which studies share; each cell is RL and evaluation. What is in the file
is not run again, what failed twice is a result too, what is missing is listed as unrun. Stop it with Ctrl-C: only the
cell at hand is lost. A second call beside the first takes other cells, which is faster, as generator and learner wait
for each other in most of them; not of asynchronous and remax, where seconds count.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cell_queue import MAX_ATTEMPTS, Base, Cell, run_queue, shared_report
from default_run import describe_machine
from reports import git, read_changes
from study_figure import draw
from study_grids import BASES, STUDIES, Study
from study_table import format_report


def main() -> None:
    arguments = parse_arguments()
    study = STUDIES[arguments.name]
    report = read_report(arguments, study)
    if not arguments.table and not arguments.figure:
        if arguments.retry:
            with shared_report(report, arguments.out, arguments.workspace):
                report["failed"] = {}
        report["commit"] = git("rev-parse", arguments.code or report["commit"])
        cells = [place(cell, report) for cell in study.cells if is_chosen(cell, arguments.only)]
        seconds_count = study.figure == "curves"
        report["unrun"] = list_unrun(study.cells, report)
        run_queue(cells, report, arguments.out, arguments.workspace, arguments.hours, alone=seconds_count)
    if arguments.figure:
        draw(study, report, arguments.out.with_suffix(".png"))
    else:
        print(format_report(study, report))
        print("\nunrun: " + ("; ".join(list_unrun(study.cells, report)) or "none"))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(STUDIES))
    parser.add_argument("--workspace", type=Path, default=Path(".slipstream/study"), help="where the clones go; kept")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hours", type=float, default=24.0, help="no cell starts later than this")
    parser.add_argument("--only", nargs="+", default=[], metavar="KEY", help="cells whose key contains one of these")
    parser.add_argument("--set", nargs="*", default=[], metavar="section.key=value", help="other settings of all cells")
    parser.add_argument("--code", help="commit that further cells run; by default the one the file names, or HEAD")
    parser.add_argument("--retry", action="store_true", help="forget what failed, so that it is tried again")
    parser.add_argument("--table", action="store_true", help="only print what the file holds, as Markdown")
    parser.add_argument("--figure", action="store_true", help="only draw what the file holds, beside it as .png")
    return parser.parse_args()


def read_report(arguments: argparse.Namespace, study: Study) -> dict[str, Any]:
    """What an earlier call has found; its settings must be the same."""
    used = sorted({cell.base.name for cell in study.cells})
    settings = {
        "study": arguments.name,
        "changes": arguments.set,
        "bases": {name: BASES[name].settings for name in used},
    }
    path: Path = arguments.out
    if not path.exists():
        if arguments.table or arguments.figure:
            raise SystemExit(f"{path}: no such file; run the study first, without --table and --figure")
        return {"commit": "HEAD", **settings, "machine": describe_machine(), "cells": {}, "failed": {}, "unrun": []}
    report: dict[str, Any] = json.loads(path.read_text())
    if arguments.table or arguments.figure:
        return report
    for key, value in settings.items():
        if report[key] != value:
            raise SystemExit(f"{path}: {key} is {report[key]!r}, now {value!r}; name another file")
    return report


def place(cell: Cell, report: dict[str, Any]) -> Cell:
    """The cell on a base with the settings of all cells."""
    changes = read_changes(report["changes"])
    return dataclasses.replace(cell, base=Base(f"base-{cell.base.name}", cell.base.settings | changes))


def is_chosen(cell: Cell, only: list[str]) -> bool:
    return not only or any(part in cell.key for part in only)


def list_unrun(cells: Iterable[Cell], report: dict[str, Any]) -> list[str]:
    """Those that have neither run nor failed for good."""
    spent = {key for key, failure in report["failed"].items() if failure["attempts"] >= MAX_ATTEMPTS}
    return [cell.key for cell in cells if cell.key not in report["cells"] and cell.key not in spent]


if __name__ == "__main__":
    main()
