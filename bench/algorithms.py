"""Does every algorithm raise the proxy score on the default task, synchronous and one step off? A resumable queue.

    python bench/algorithms.py --workspace DIR --hours 3 --out docs/benchmarks/2026-11-22-algorithms.json
    python bench/algorithms.py --workspace DIR --seconds --out docs/benchmarks/2026-11-22-algorithms-seconds.json

Each cell of the table is one algorithm, one staleness and one seed of section `rl`. The stages up to the reward model
run once, in DIR/base-COMMIT-SETTINGS; a cell is a clone that takes them from DVC's cache, so only RL and evaluation
run. What a cell found is written at once; a cell that is in the file is not run again, one that is missing is listed as
unrun. A queue that is taken up again runs the code it began with, whose commit the file names; `--code COMMIT` goes on
with another one, and is for commits whose stages compute the same. Each cell names its own. A second call beside the
first takes other cells, so the first table has no seconds: those are measured by `--seconds`, in short runs that have
the machine to themselves. See cell_queue.py.
"""

import argparse
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

from cell_queue import Base, Cell, run_queue
from default_run import describe_machine
from reports import git, read_changes

MODES: dict[str, dict[str, Any]] = {"async 1": {"max_staleness": 1}, "sync": {"max_staleness": 0}}
SETTINGS: dict[str, dict[str, Any]] = {
    "online_dpo": {},
    "ppo": {"samples_per_prompt": 4},
    "rloo": {},
    "remax": {"samples_per_prompt": 2},
    "proximal_rloo": {},
    "copg": {},
    "best_of_n": {},
    "reinforce": {"samples_per_prompt": 4},
    "reinforce_pp": {},
    "grpo": {},
    "dpo": {},
}
"""Beside the defaults; about as many samples of each prompt for all."""
SHORT: dict[str, Any] = {"rl.num_updates": 6, "rl.eval_every": 6, "rl.checkpoint_every": 6}
"""Of the runs that are timed."""
SEEDS = {"online_dpo": (0, 1, 2), "ppo": (0, 1, 2), "rloo": (0, 1, 2), "remax": (0, 1, 2)}


def main() -> None:
    arguments = parse_arguments()
    show = format_seconds if arguments.seconds else format_table
    if arguments.table:
        if not arguments.out.exists():
            raise SystemExit(f"{arguments.out}: no such file; run the queue first, without --table")
        print(show(json.loads(arguments.out.read_text())["cells"]))
        return
    report = read_report(arguments.out, arguments.set, "seconds" if arguments.seconds else "table")
    report["commit"] = git("rev-parse", arguments.code or report["commit"])
    base = Base(settings=read_changes(arguments.set))
    list_all = list_timed if arguments.seconds else list_cells
    cells = list_all(arguments.algorithms, arguments.modes, base)
    report["unrun"] = [cell.key for cell in list_all(list(SETTINGS), list(MODES), base)]
    run_queue(cells, report, arguments.out, arguments.workspace, arguments.hours, alone=arguments.seconds)
    print(show(report["cells"]))
    print("\nunrun: " + ("; ".join(cell.key for cell in cells if cell.key not in report["cells"]) or "none"))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workspace", type=Path, required=True, help="where the clones go; kept")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hours", type=float, default=24.0, help="no cell starts later than this")
    parser.add_argument("--algorithms", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--set", nargs="*", default=[], metavar="section.key=value", help="other settings of all cells")
    parser.add_argument("--code", help="commit that further cells run; by default the one the file names")
    parser.add_argument("--seconds", action="store_true", help="time short runs instead, each alone on the machine")
    parser.add_argument("--table", action="store_true", help="only print what the file holds")
    return parser.parse_args()


def list_cells(algorithms: list[str], modes: list[str], base: Base) -> list[Cell]:
    """In the order they are run: all algorithms once in each mode, then the further seeds of a mode after the other."""
    places = [(mode, 0) for mode in modes] + [(mode, seed) for mode in modes for seed in (1, 2)]
    return [
        make_cell(algorithm, mode, seed, base)
        for mode, seed in places
        for algorithm in algorithms
        if seed in SEEDS.get(algorithm, (0,)) and not (algorithm == "dpo" and mode != "sync")
    ]


def make_cell(algorithm: str, mode: str, seed: int, base: Base) -> Cell:
    settings = {"rl.seed": seed, "rl.algorithm": {"name": algorithm, **SETTINGS[algorithm]}}
    settings |= {f"rl.{name}": value for name, value in MODES[mode].items()}
    labels = {"algorithm": algorithm, "mode": mode, "seed": seed}
    return Cell(f"{algorithm}, {mode}, seed {seed}", labels, settings, base)


def list_timed(algorithms: list[str], modes: list[str], base: Base) -> list[Cell]:
    """Of each algorithm and mode a few updates, without evaluation."""
    return [
        dataclasses.replace(cell, settings=cell.settings | SHORT, stages=("train_policy",))
        for cell in list_cells(algorithms, modes, base)
        if cell.labels["seed"] == 0
    ]


def read_report(path: Path, changes: list[str], kind: str) -> dict[str, Any]:
    """What an earlier call of this kind has found; its settings must be the same."""
    settings = {"kind": kind, "changes": changes, "settings": SETTINGS}
    if not path.exists():
        return {"commit": "HEAD", **settings, "machine": describe_machine(), "cells": {}, "unrun": []}
    report: dict[str, Any] = json.loads(path.read_text())
    for key, value in settings.items():
        if report.get(key) != value:
            raise SystemExit(f"{path}: {key} is {report.get(key)!r}, now {value!r}; name another file")
    return report


def format_table(cells: dict[str, dict[str, Any]]) -> str:
    """A row for each algorithm and mode, mean ± standard deviation over seeds."""
    columns = {
        "proxy, SFT": "proxy_mean_sft",
        "proxy, policy": "proxy_mean_policy",
        "gold win-rate": "gold_win_rate",
        "KL, nats": "kl_nats",
        "length ratio": "length_ratio",
        "peak GiB": "learner_peak_gib",
    }
    return format_rows(cells, columns)


def format_seconds(cells: dict[str, dict[str, Any]]) -> str:
    """A row for each algorithm and mode: medians over the updates of a run."""
    return format_rows(
        cells, {"learn, s / update": "learn_s_of_an_update", "all, s / update": "elapsed_s_of_an_update"}
    )


def format_rows(cells: dict[str, dict[str, Any]], columns: dict[str, str]) -> str:
    """A Markdown table of these values by their titles, a row for each algorithm and mode, in the order of SETTINGS."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in sorted(cells.values(), key=lambda cell: (list(SETTINGS).index(cell["algorithm"]), cell["mode"])):
        groups.setdefault((cell["algorithm"], cell["mode"]), []).append(cell)
    rows = [f"| algorithm | mode | runs | {' | '.join(columns)} |", "|---" * (3 + len(columns)) + "|"]
    for (algorithm, mode), members in groups.items():
        values = (describe([member[name] for member in members if name in member]) for name in columns.values())
        rows.append(f"| {algorithm} | {mode} | {len(members)} | {' | '.join(values)} |")
    return "\n".join(rows)


def describe(values: list[float]) -> str:
    """Mean, and standard deviation where there are several; a dash for none."""
    if not values:
        return "–"
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


if __name__ == "__main__":
    main()
