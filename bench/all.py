"""All benchmarks at a small size, in one table: figure, target, measured, met or not. What `make bench` runs.

    python bench/all.py --out .slipstream/bench

Needs the artifacts of a pipeline that has finished, for the scripts that read them. all_rows.py lists the scripts with
their arguments and the figures. Writes table.md, table.json and each script's own JSON and log into --out; a script
that has run there on the same code and inputs is not run again. Small sizes are noisy: a figure near its target wants
the script's own full run (README.md). Exit code 1 if a script failed to run; a target that is missed is said, and is
none.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from all_rows import Figure, Script, scripts
from reports import ROOT, describe_run, format_rows, write_report

HEAD = ("figure", "target", "measured", "met", "script")
LIMIT_S = 900.0
NUM_BESIDE = 2
"""Scripts at a time, of those that measure no seconds. One needs at most 6.5 GB."""
REPORT_LOCK = threading.Lock()
RUNNING: "set[subprocess.Popen[bytes]]" = set()
"""Scripts, each the head of a process group."""
END_S = 5.0
"""Seconds that a script and what it started get to end by themselves, after SIGINT and after SIGTERM."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / ".slipstream/bench", help="folder of tables, JSON and logs")
    parser.add_argument("--inputs", type=Path, default=ROOT / "artifacts", help="of a project that has finished")
    parser.add_argument("--only", nargs="+", default=[], metavar="SCRIPT", help="these alone, such as ranks.py")
    parser.add_argument("--trl-python", help="interpreter of an environment made from requirements/trl.txt")
    parser.add_argument("--table", action="store_true", help="print the table that is in --out, and run nothing")
    arguments = parser.parse_args()
    # As an exception it ends the scripts at hand too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    out = arguments.out.resolve()
    if arguments.table:
        print(read_table(out), end="")
        return 0
    workspace = out / "bench-workspace"
    chosen = scripts(arguments.inputs.resolve(), workspace, arguments.trl_python)
    unknown = sorted(set(arguments.only) - {script.name for script in chosen})
    if unknown:
        raise SystemExit(f"--only {unknown[0]}: allowed: {', '.join(script.name for script in chosen)}")
    if workspace.exists():
        shutil.rmtree(workspace)  # an earlier call's
    workspace.mkdir(parents=True)
    report = read_state(out / "table.json", arguments.inputs.resolve())
    wanted = [script for script in chosen if not arguments.only or script.name in arguments.only]
    try:
        for script in wanted:
            if script.counts_seconds:
                measure(script, arguments.inputs, out, report)
        measure_beside([script for script in wanted if not script.counts_seconds], arguments.inputs, out, report)
    finally:
        end_all()
    print(format_table(report))
    return int(any(report["scripts"][script.name]["state"] == "failed" for script in wanted))


def read_table(out: Path) -> str:
    if not (out / "table.md").exists():
        raise SystemExit(f"--out {out}: has no table.md; measure first, without --table")
    return (out / "table.md").read_text(encoding="utf-8")


def read_state(path: Path, inputs: Path) -> dict[str, Any]:
    """What an earlier call found on this code, machine and finished pipeline; nothing of others."""
    finished = inputs.parent / "metrics/policy.json"
    about = describe_run() | {"inputs": [str(inputs), finished.stat().st_mtime if finished.exists() else None]}
    if path.exists():
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if {key: report.get(key) for key in about} == about:
            return report
    return {**about, "scripts": {}}


def measure(script: Script, inputs: Path, out: Path, report: dict[str, Any]) -> None:
    """Run a script unless there is nothing to run or it has run, and write the tables with what it gave."""
    if report["scripts"].get(script.name, {}).get("state") == "measured":
        return
    started = time.monotonic()
    reason = find_obstacle(script, inputs)
    if reason is None:
        print(f"{script.name} …", file=sys.stderr, flush=True)
        row = run(script, out)
        print(f"{script.name}: {row['state']}, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    else:
        row = {"state": "failed" if reason.startswith("failed") else "left out", "reason": reason, "figures": []}
        row["figures"] = [describe(figure, None) for figure in script.figures]
    with REPORT_LOCK:
        report["scripts"][script.name] = row | {"seconds": round(time.monotonic() - started, 1)}
        write_report(out / "table.json", report)
        (out / "table.md").write_text(format_table(report) + "\n", encoding="utf-8")


def measure_beside(scripts: Sequence[Script], inputs: Path, out: Path, report: dict[str, Any]) -> None:
    """`measure` of scripts that do not disturb each other, some at a time."""
    with ThreadPoolExecutor(NUM_BESIDE) as pool:
        try:
            for running in [pool.submit(measure, script, inputs, out, report) for script in scripts]:
                running.result()
        finally:  # after Ctrl-C no further script starts, and none goes on
            pool.shutdown(wait=False, cancel_futures=True)
            end_all()


def find_obstacle(script: Script, inputs: Path) -> str | None:
    """Why a script is not run."""
    if not (ROOT / "bench" / script.name).exists():
        return "not there yet"
    if script.skip:
        return script.skip
    if script.needs_inputs and not (inputs / "policy").exists():
        return f"failed: {inputs} has no finished pipeline; `make run` makes one"
    return None


def run(script: Script, out: Path) -> dict[str, Any]:
    """The figures of one run, or why there are none."""
    name = script.name.replace("/", "-").removesuffix(".py")
    result, log = out / f"{name}.json", out / f"{name}.log"
    result.unlink(missing_ok=True)
    command = [sys.executable, str(ROOT / "bench" / script.name), *script.arguments, "--out", str(result)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    try:
        code = call(command, environment, log)
        if code and not result.exists():
            return fail(script, f"failed: exit code {code}: {last_line(log)}")
        measured = json.loads(result.read_text(encoding="utf-8"))
        values = [figure.read(measured) if figure.read else None for figure in script.figures]
    except subprocess.TimeoutExpired:
        return fail(script, f"failed: not done after {LIMIT_S:.0f} s, see {log.name}")
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        return fail(script, f"failed: {result.name} has no such figure: {type(error).__name__}: {error}")
    figures = [describe(figure, value) for figure, value in zip(script.figures, values, strict=True)]
    if code and not any(figure["met"] is False for figure in figures):
        return fail(script, f"failed: exit code {code}: {last_line(log)}")
    return {"state": "measured", "reason": "ran", "figures": figures}


def call(command: Sequence[str], environment: dict[str, str], log: Path) -> int:
    """Its exit code. However this is left, none of its processes goes on beside the next script's seconds."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        RUNNING.add(process)
        try:
            return process.wait(LIMIT_S)
        finally:
            end(process)


def end(process: "subprocess.Popen[bytes]") -> None:
    """End a script and what it has started: as Ctrl-C does, so that it clears up, then by force."""
    with contextlib.suppress(ProcessLookupError):  # nobody of the group is left
        try:
            for kind in (signal.SIGINT, signal.SIGTERM):
                os.killpg(process.pid, kind)
                deadline = time.monotonic() + END_S
                while time.monotonic() < deadline:
                    process.poll()
                    os.killpg(process.pid, 0)
                    time.sleep(0.05)
        finally:  # a second Ctrl-C does not keep it alive
            os.killpg(process.pid, signal.SIGKILL)
    RUNNING.discard(process)


def end_all() -> None:
    for process in list(RUNNING):
        end(process)


def fail(script: Script, reason: str) -> dict[str, Any]:
    return {"state": "failed", "reason": reason, "figures": [describe(figure, None) for figure in script.figures]}


def describe(figure: Figure, value: float | None) -> dict[str, Any]:
    met = None if value is None else figure.is_met(value)
    return {"figure": figure.name, "target": figure.target, "measured": value, "unit": figure.unit, "met": met}


def last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:150] if lines else "it said nothing"


def format_table(report: dict[str, Any]) -> str:
    """Every figure, as Markdown."""
    rows: list[Sequence[str]] = []
    for name, row in report["scripts"].items():
        for figure in row["figures"]:
            value, met = figure["measured"], {None: "–", True: "yes", False: "no"}[figure["met"]]
            shown = row["reason"] if value is None else f"{value:.3g}{figure['unit']}"
            rows.append((figure["figure"], figure["target"], shown.replace("|", "/"), met, f"`{name}`"))
    return format_rows(HEAD, rows)


if __name__ == "__main__":
    sys.exit(main())
