"""What part of an RL run's wall-clock time are publications and the ledger: read off a finished run's metrics.

    python bench/limits_run.py --out FILE.json

Reads metrics/policy.json and plots/policy.csv of a project whose pipeline has finished, or those of --runs; nothing is
run. `publish` is what the learner needs to write a version's weights and to compute its probe, `ledger` what it needs
to force the rows of an update to disk and to put the segments together at the end. `swap`, the generator's time without
work around a publication, is shown beside them, as is what the learner waits. `update_s` is an update
between two evaluations, the first one left out, and `publish_of_update` what publishing takes of it; both are medians
over the run.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cell_queue import read_seconds
from reports import ROOT, describe_run, format_rows, write_report

TARGET = 0.02
PARTS = ("publish_s", "ledger_s", "swap_s", "wait_for_rollouts_s", "checkpoint_s", "evaluate_s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="+", default=[ROOT / "metrics/policy.json"], help="a file per run")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", action="store_true", help="print the table of the file of --out, and read no run")
    arguments = parser.parse_args()
    if arguments.table:
        print(format_table(json.loads(arguments.out.read_text(encoding="utf-8"))))
        return
    rounds = [read_shares(path) for path in arguments.runs]
    names = {name for one in rounds for name in one}
    summary = {name: statistics.median(one[name] for one in rounds if name in one) for name in sorted(names)}
    report = {**describe_run(), "rounds": rounds, "summary": summary}
    write_report(arguments.out, report)
    print(format_table(report))


def read_shares(path: Path) -> dict[str, float]:
    """Parts of `wall_s`."""
    if not path.exists():
        raise SystemExit(f"{path}: not found; run the pipeline first (`make run`), or name the file with --runs")
    metrics: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    missing = [name for name in (*PARTS, "wall_s") if name not in metrics]
    if missing:
        raise SystemExit(f"{path}: has no {missing[0]}; it is of an older version of the code, run train_policy again")
    shares = {name.removesuffix("_s"): metrics[name] / metrics["wall_s"] for name in PARTS}
    shares |= {"publish_and_ledger": shares["publish"] + shares["ledger"], "wall_s": metrics["wall_s"]}
    return shares | read_update(path.parents[1] / "plots/policy.csv")


def read_update(path: Path) -> dict[str, float]:
    """Seconds of an update between evaluations and what part of them is publishing; nothing if there is none."""
    if not path.exists():
        raise SystemExit(f"{path}: not found; it is written beside metrics/policy.json by the same run")
    seconds = read_seconds(path)
    if not seconds["elapsed_s"]:
        return {}
    shares = [publish / whole for publish, whole in zip(seconds["publish_s"], seconds["elapsed_s"], strict=True)]
    return {"update_s": statistics.median(seconds["elapsed_s"]), "publish_of_update": statistics.median(shares)}


def format_table(report: dict[str, Any]) -> str:
    """Medians over the runs."""
    summary: dict[str, float] = report["summary"]
    rows: Sequence[Sequence[str]] = [
        (name, f"{100 * summary[name]:.2f} %") for name in summary if not name.endswith("_s")
    ]
    return format_rows(("part", "of the wall-clock time (publish_of_update: of an update's)"), rows)


if __name__ == "__main__":
    main()
