"""A drill of the orchestration: a real worker and real services, and a fault in the middle of a pipeline's run.

    python bench/orchestration_drill.py --out docs/benchmarks/2026-11-21-orchestration-drill.json

A scenario is one run of the whole pipeline with a two-layer model, as flow `rlhf/local` on `python -m flows.worker`,
with PostgreSQL, Prefect's server and MLflow's from `python -m flows.services`. In the middle of a stage a process is
killed or stopped, and what a person would do is done: a new worker, or `prefect flow-run retry`. Afterwards everything
that was recorded is compared: Prefect's state, the stages' own logs, the ledger, MLflow, DVC, processes and ports.
Exit code 0: nothing was lost, done twice or left behind. Linux only.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from mlflow import MlflowException
from prefect.client.schemas.objects import FlowRun

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from drill import describe_machine  # noqa: E402
from orchestration_checks import Findings, examine  # noqa: E402
from orchestration_site import NUM_UPDATES, Line, Site, Watch, is_taken, list_ports, make_site, read_update, send, wait  # noqa: E402
from reports import write_json  # noqa: E402

RUN_S = 420.0
"""For a run to reach the stage that is hit, and for all that follows the fault."""
GONE_S = 20.0
"""For everything of a run that has ended to be gone."""
CANCEL_S = 150.0
"""For a run to be cancelled; a worker that has lost the server's events asks for them once a minute."""
AWAY_S = 40.0
"""For which Prefect's server is kept away in `prefect-away`."""


@dataclass(frozen=True)
class Scenario:
    """What is done to a run, and when."""

    fault: str
    do: Callable[[Site, FlowRun], None]
    stage: str = "train_policy"
    update: int = 32
    """Of the stage; the fault comes right after it."""
    num_updates: int = NUM_UPDATES
    """Of train_policy."""


@dataclass
class Row:
    """One scenario and what came of it. Seconds count from the fault."""

    scenario: str
    fault: str
    stage: str
    update: int
    """The last one made before the fault."""
    state: str = ""
    """Of the flow run, at the end."""
    attempts: int = 0
    """Flow-run processes it took."""
    resumed_from: int | None = None
    """Updates; None: the training was not interrupted."""
    went_on_s: float | None = None
    """Until the next update; if the training was started again, until the first one that it made."""
    longest_pause_s: float | None = None
    """Between two updates, from the fault on."""
    seconds: float = 0.0
    """Of the whole run."""
    processes_left: list[str] = field(default_factory=list)
    ports_left: list[int] = field(default_factory=list)
    code: str = ""
    """Commit that was drilled."""
    findings: Findings | None = None
    problems: list[str] = field(default_factory=list)


def kill_worker(site: Site, _run: FlowRun) -> None:
    send(signal.SIGKILL, site.list_worker_processes())
    site.start_worker()


def lose_machine(site: Site, _run: FlowRun) -> None:
    workers = site.list_worker_processes()
    engines = [engine for worker in workers[1:] for engine in worker.children()]
    send(signal.SIGKILL, [*workers, *engines])
    site.start_worker()


def stop_worker(site: Site, _run: FlowRun) -> None:
    site.stop_worker()
    site.start_worker()


def kill_server(name: str, site: Site, _run: FlowRun) -> None:
    psutil.Process(site.server_pid(name)).kill()


def keep_prefect_away(site: Site, run: FlowRun) -> None:
    supervisor = psutil.Process(site.state.pid)
    pid = site.server_pid("prefect")
    supervisor.suspend()
    try:
        psutil.Process(pid).kill()
        time.sleep(AWAY_S)
        if site.read_run(run) is not None:
            raise RuntimeError("Prefect's server answers, although it was killed and nobody could start it again")
    finally:
        supervisor.resume()


def cancel_and_retry(site: Site, run: FlowRun) -> None:
    site.python("prefect", "flow-run", "cancel", str(run.id))
    if not wait(lambda: read_state(site, run) == "Cancelled", CANCEL_S):
        raise RuntimeError(f"the run is {read_state(site, run)} and not Cancelled")
    if not wait(lambda: not site.list_others(), GONE_S):
        raise RuntimeError(f"of the cancelled run is left: {[item.cmdline() for item in site.list_others()]}")
    site.python("prefect", "flow-run", "retry", str(run.id))
    wait(lambda: read_state(site, run) != "Cancelled", GONE_S)


def cancel_after_outage(site: Site, run: FlowRun) -> None:
    keep_prefect_away(site, run)
    wait(lambda: site.read_run(run) is not None, CANCEL_S)
    cancel_and_retry(site, run)


SCENARIOS = {
    "worker": Scenario("SIGKILL of the worker", kill_worker, "train_sft", 4),
    "machine": Scenario("SIGKILL of worker and flow run", lose_machine),
    "ctrl-c": Scenario("SIGTERM of the worker", stop_worker),
    "prefect": Scenario("SIGKILL of Prefect's server", functools.partial(kill_server, "prefect")),
    "prefect-away": Scenario(f"Prefect's server away for {AWAY_S:.0f} s", keep_prefect_away),
    "mlflow": Scenario("SIGKILL of MLflow's server", functools.partial(kill_server, "mlflow")),
    "postgres": Scenario("SIGKILL of PostgreSQL", functools.partial(kill_server, "postgres")),
    "cancel": Scenario("`prefect flow-run cancel`, then `retry`", cancel_and_retry),
    "cancel-after-outage": Scenario(
        f"Prefect's server away for {AWAY_S:.0f} s, then `cancel` and `retry`", cancel_after_outage, num_updates=1000
    ),
}


def run_scenario(name: str, site: Site) -> Row:
    """One run of the pipeline with a fault in its middle."""
    scenario = SCENARIOS[name]
    # A new seed for each: what comes before the stage that is hit is in DVC's run cache after the first run.
    seed = "sft.seed" if scenario.stage == "train_sft" else "rl.seed"
    run = site.start_run({seed: int(time.time()) % 10**6, "rl.num_updates": scenario.num_updates})
    watch = Watch(site.clone(run) / ".slipstream/logs" / f"{scenario.stage}.log")
    row, started = Row(name, scenario.fault, scenario.stage, 0, code=site.code), time.monotonic()
    try:
        inject(scenario, site, run, watch, row)
    except (RuntimeError, AssertionError) as error:
        row.problems.append(" ".join(str(error).split()))
    finally:
        watch.close()
    row.seconds = round(time.monotonic() - started, 1)
    note_end(site, run, row)
    try:
        row.findings = examine(site, run)
        row.problems += row.findings.find_problems(scenario.stage, scenario.num_updates)
    except (RuntimeError, OSError, subprocess.SubprocessError, MlflowException) as error:  # nothing to look at
        row.problems.append(" ".join(str(error).split()))
    return row


def inject(scenario: Scenario, site: Site, run: FlowRun, watch: Watch, row: Row) -> None:
    is_there = wait(lambda: watch.find_update(scenario.update) or is_over(site, run), RUN_S)
    if not is_there or is_over(site, run):
        raise RuntimeError(
            f"{scenario.stage} did not reach update {scenario.update}; the run is {read_state(site, run)}"
        )
    row.update = max(read_update(line.text) or 0 for line in watch.lines)
    at = time.monotonic()
    scenario.do(site, run)
    wait(lambda: is_over(site, run), RUN_S)
    note_training(row, watch.lines, at)


def note_training(row: Row, lines: list[Line], at: float) -> None:
    """Where the training went on, and after how long."""
    matches = [(line.at, re.search(r"\bresumed (?:policy_version|update)=(\d+)", line.text)) for line in lines]
    resumed = [(moment, int(match[1])) for moment, match in matches if match and moment > at]
    since = resumed[0][0] if resumed else at
    row.resumed_from = resumed[0][1] if resumed else None
    updates = [line.at for line in lines if read_update(line.text) is not None and line.at > at]
    row.went_on_s = next((round(moment - at, 1) for moment in updates if moment >= since), None)
    moments = [at, *updates]
    row.longest_pause_s = max((round(after - before, 1) for before, after in itertools.pairwise(moments)), default=None)


def note_end(site: Site, run: FlowRun, row: Row) -> None:
    """The state of the run, and what is left of it."""
    wait(lambda: site.read_run(run) is not None, 120)
    found = site.read_run(run)
    row.state, row.attempts = read_state(site, run), found.run_count if found else 0
    wait(lambda: not site.list_others(), GONE_S)
    left = site.list_others()
    row.processes_left = [" ".join(process.cmdline()[:8]) for process in left]
    row.ports_left = list_ports(left)
    row.problems += [] if row.state == "Completed" else [f"the run is {row.state}"]
    row.problems += [f"left: {text}" for text in row.processes_left]


def is_over(site: Site, run: FlowRun) -> bool:
    found = site.read_run(run)
    # A crashed run is scheduled again; it is over when nobody did that.
    return found is not None and found.state is not None and found.state.is_final() and not found.state.is_crashed()


def read_state(site: Site, run: FlowRun) -> str:
    found = site.read_run(run)
    return str(found.state.name) if found is not None and found.state is not None else "unknown"


def format_table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row per scenario."""
    lines = [
        "| fault | during, after update | end | flow-run processes | resumed from | went on after, s "
        "| longest pause, s | rows rolled back | violations in the ledger | points missing in MLflow | left | run, s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in (rows[name] for name in SCENARIOS if name in rows):
        unknown = {"rows_rolled_back": "?", "points_missing": "?", "points": "?", "violations": "?"}
        found = row["findings"] or unknown
        cells = [
            *(row["fault"], f"`{row['stage']}`, {row['update']}", row["state"], row["attempts"]),
            *("–" if row[name] is None else row[name] for name in ("resumed_from", "went_on_s", "longest_pause_s")),
            *(found["rows_rolled_back"], len(found["violations"])),
            *(f"{found['points_missing']} of {found['points']}", len(row["processes_left"]) + len(row["ports_left"])),
            round(row["seconds"]),
        ]
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return "\n".join(lines)


def read_rows(path: Path | None) -> dict[str, dict[str, Any]]:
    """Of earlier calls."""
    if path is None or not path.exists():
        return {}
    rows: dict[str, dict[str, Any]] = json.loads(path.read_text())["rows"]
    return rows


def write_report(path: Path | None, rows: dict[str, dict[str, Any]]) -> None:
    write_json(path, describe_machine() | {"rows": rows})


def hide_folders(row: Row, site: Site) -> dict[str, Any]:
    """The row without where things lie on this machine, which is nobody's business."""
    text = json.dumps(dataclasses.asdict(row)).replace(str(site.folder), "SITE").replace(sys.prefix, "VENV")
    shown: dict[str, Any] = json.loads(text)
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", nargs="*", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument(
        "--workspace", type=Path, help="a folder that PostgreSQL's user can enter; it is kept and used again"
    )
    parser.add_argument("--out", type=Path, help="JSON, written after each scenario; others that it holds are kept")
    arguments = parser.parse_args()
    folder = arguments.workspace or Path(tempfile.mkdtemp(prefix="orchestration-drill-"))
    folder.mkdir(exist_ok=True)
    rows = read_rows(arguments.out)
    with make_site(folder) as site:
        for name in arguments.scenarios:
            rows[name] = hide_folders(run_scenario(name, site), site)
            print(time.strftime("%H:%M:%S"), name, rows[name]["problems"] or "is clean", file=sys.stderr, flush=True)
            write_report(arguments.out, rows)
        ports = site.ports.values()
    print(format_table(rows))
    problems = [f"{name}: {problem}" for name, row in rows.items() for problem in row["problems"]]
    problems += [f"port {port} is still taken" for port in ports if is_taken(port)]
    print("\n" + ("\n".join(problems) or "Nothing was lost, done twice or left behind."))
    if arguments.workspace is None and not problems:
        shutil.rmtree(folder)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
