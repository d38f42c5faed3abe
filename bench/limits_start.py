"""How long until something happens: `dvc repro` with nothing to do, and every stage until its first useful work.

    python bench/limits_start.py --project . --out FILE.json

Needs a project whose pipeline has finished (`make run`); it is left as it is. `nothing` is the wall-clock time of
`dvc repro` and of `make run` when all is up to date; where the project has no environment of its own, `make run`
stands for the commands of its recipe. `stages` starts each stage in a copy of the project's settings with links to its
artifacts, and ends it when its useful work begins: the first completion asked for, the first batch trained on. Whose
seconds they were is said by limits_marks.py, which explains the names. A round is each of these once.
"""

import argparse
import ctypes
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reports import ROOT, describe_run, format_rows, read_report, write_report

STAGES = (
    "prepare_model",
    "prepare_data",
    "train_sft",
    "label_pairs",
    "train_reward",
    "train_policy",
    "sample_policy",
    "judge_policy",
)
NOTHING = {
    "dvc repro": [("dvc", "repro")],
    "make run": [("stages.check_params",), ("flows.dvc",), ("stages.report",)],
}
"""Modules with their arguments; the second are what `make run` runs."""
TARGET_S = 4.0
LIMIT_S = 600.0
NUM_SHARES = 8
"""Largest shares that the table shows."""
PR_SET_CHILD_SUBREAPER = 36


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="those already in the file of --out are kept")
    parser.add_argument("--stages", nargs="*", default=list(STAGES), choices=STAGES, help="none: `nothing` alone")
    parser.add_argument("--project", type=Path, default=ROOT, help="a checkout whose pipeline has finished")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", action="store_true", help="print the table of the file of --out, and run nothing")
    arguments = parser.parse_args()
    if arguments.table:
        print(format_table(read_report(arguments.out, {})))
        return
    project = arguments.project.resolve()
    if not (project / "dvc.lock").exists():
        raise SystemExit(f"--project {project}: has no dvc.lock; run its pipeline first (`make run`)")
    adopt_orphans()
    report = read_report(arguments.out, {"stages": arguments.stages, **describe_run()})
    for _ in range(len(report["rounds"]), arguments.rounds):
        nothing = {name: time_nothing(name, project) for name in NOTHING}
        stages = {stage: start_stage(stage, project) for stage in arguments.stages}
        report["rounds"].append({"nothing": nothing, "stages": stages})
        report["summary"] = summarise(report["rounds"])
        write_report(arguments.out, report)
    print(format_table(report))


def time_nothing(name: str, project: Path) -> dict[str, float]:
    """Wall-clock and processor seconds of a command that finds everything up to date."""
    is_made = name == "make run" and (project / "Makefile").exists() and (project / ".venv/installed.sha256").exists()
    commands = [["make", "run"]] if is_made else [[sys.executable, "-m", *words] for words in NOTHING[name]]
    before, started = os.times(), time.perf_counter()
    for command in commands:
        done = subprocess.run(command, cwd=project, env=make_environment(project), capture_output=True, text=True)
        if done.returncode or "Running stage" in done.stdout:
            raise SystemExit(
                f"{' '.join(command)} in {project}: not up to date\n{done.stdout[-500:]}{done.stderr[-500:]}"
            )
    after = os.times()
    cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
    return {"wall_s": time.perf_counter() - started, "cpu_s": cpu_s}


def start_stage(stage: str, project: Path) -> dict[str, dict[str, float]]:
    """Seconds of each moment, and of each share, of one start."""
    with tempfile.TemporaryDirectory(prefix="limits-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        copy_project(project, folder)
        command = [sys.executable, str(ROOT / "bench/limits_marks.py"), stage]
        done = subprocess.run(
            command, cwd=folder, env=make_environment(folder), capture_output=True, text=True, timeout=LIMIT_S
        )
        wait_for_orphans()
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise SystemExit(f"{stage} ended with code {done.returncode} before its work began\n{done.stderr[-1500:]}")
    measured: dict[str, dict[str, float]] = json.loads(lines[-1])
    return measured


def copy_project(project: Path, folder: Path) -> None:
    """Settings, code and inputs as they are, artifacts as links: what a stage stages is gone with the folder."""
    for name in ("params.yaml", "dvc.yaml", "dvc.lock"):
        shutil.copy(project / name, folder / name)
    for name in ("stages", "inputs", "tiny"):
        if (project / name).exists():
            (folder / name).symlink_to(project / name)
    (folder / "artifacts").mkdir()
    for path in (project / "artifacts").iterdir():
        (folder / "artifacts" / path.name).symlink_to(path)
    for name in ("metrics", "plots"):
        (folder / name).mkdir()


def make_environment(folder: Path) -> dict[str, str]:
    dropped = {"DVC_STAGE", "MLFLOW_TRACKING_URI", "SLIPSTREAM_PIPELINE"}
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return kept | {"PYTHONPATH": str(folder), "PATH": path, "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}


def adopt_orphans() -> None:
    """Be the parent of what a stage leaves behind, so that it can be waited for. Linux only."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def wait_for_orphans() -> None:
    """The stage's servers end by themselves, and until then they have a core."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            time.sleep(0.1)
    raise SystemExit(f"a process that a stage had started was still there after {LIMIT_S:.0f} s")


def summarise(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians of everything."""

    def medians(rows: Sequence[dict[str, float]]) -> dict[str, float]:
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: round(statistics.median(row.get(name, 0.0) for row in rows), 3) for name in names}

    first = rounds[0]
    return {
        "nothing": {name: medians([one["nothing"][name] for one in rounds]) for name in first["nothing"]},
        "stages": {
            stage: {key: medians([one["stages"][stage][key] for one in rounds]) for key in ("moments", "shares")}
            for stage in first["stages"]
        },
    }


def format_table(report: dict[str, Any]) -> str:
    """Two tables: nothing to do, and the stages' starts with their largest shares."""
    summary = report["summary"]
    nothing = [
        (f"`{name}`, nothing to do", f"{row['wall_s']:.2f}", f"{row['cpu_s']:.2f}")
        for name, row in summary["nothing"].items()
    ]
    tables = [format_rows(("command", "wall s", "processor s"), nothing)]
    rows = []
    for stage, row in summary["stages"].items():
        largest = sorted(row["shares"].items(), key=lambda share: -share[1])[:NUM_SHARES]
        moments = ", ".join(f"{name} {value:.1f}" for name, value in row["moments"].items() if name != "first work")
        first, shares = row["moments"]["first work"], ", ".join(f"{name} {value:.1f}" for name, value in largest)
        rows.append((f"`{stage}`", f"{first:.1f}", shares, moments or "–"))
    if rows:
        tables.append(format_rows(("stage", "first work, s", "largest shares, s", "other moments, s"), rows))
    return "\n\n".join(tables)


if __name__ == "__main__":
    main()
