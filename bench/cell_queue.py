"""A resumable queue of RL runs that share the stages before RL: what algorithms.py and study.py are made of.

The stages up to the reward model run once in a clone of the code at one commit, the base; its folder is named by commit
and settings, so that no queue takes another's. A cell is a clone of the base with other settings of section `rl`, in
which only RL and evaluation run; DVC takes the rest from the base's cache. What a cell found is written at once, and
its clone is deleted. A cell that fails is written down with its last words too. Where no seconds count, several queues
of the same file and workspace share the cells.
"""

import csv
import fcntl
import functools
import hashlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path
from typing import Any

from default_run import edit_params
from peak_memory import PeakMemory
from reports import ROOT, write_json

from stages.common.entry import die_with_parent

UPSTREAM = ("prepare_model", "prepare_data", "train_sft", "label_pairs", "train_reward")
MAX_ATTEMPTS = 2
"""Of a cell that fails: once may be the machine's doing."""
CELL_TIMEOUT_S = 7200.0


@dataclass(frozen=True)
class Base:
    """What cells share: a name, and settings by their paths beside the committed params.yaml."""

    name: str = "base"
    settings: dict[str, Any] = field(default_factory=dict)

    def folder(self, commit: str) -> str:
        """Its name in the workspace."""
        settings = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()
        return f"{self.name}-{commit[:8]}-{settings[:8]}"


@dataclass(frozen=True)
class Cell:
    """One run: what it is called, what its row says of it, and its settings by their paths."""

    key: str
    labels: dict[str, Any]
    settings: dict[str, Any]
    base: Base = Base()
    stages: tuple[str, ...] = ()
    """That run after those before RL; all of them by default. With any named, the row has no verdict."""


class CellError(Exception):
    """A pipeline that ended with an exit code; says its last line."""


def run_queue(
    cells: list[Cell], report: dict[str, Any], out: Path, workspace: Path, hours: float, *, alone: bool
) -> None:
    """Run what is missing in `report`, in order; each result is written at once. No cell starts after `hours`.

    Several processes may do so with the same report and workspace: each takes cells that no other has at hand. With
    `alone`, where seconds count, no other may.

    Raises:
        SystemExit: a stage before RL failed, or another queue works where none may.
    """
    # As an exception it ends the pipeline at hand too, which would else run on in a clone that the next queue deletes.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    deadline = time.monotonic() + 3600 * hours
    with ExitStack() as stack:
        if not stack.enter_context(locked(workspace / "queues", waits=False, shared=not alone)):
            raise SystemExit(f"{workspace}: another queue works in it, and seconds count; wait for it")
        lanes = (workspace.resolve() / f"lane-{number}" for number in count())
        lane = next(path for path in lanes if stack.enter_context(locked(path, waits=False)))
        for cell in cells:
            if time.monotonic() > deadline:
                return
            with locked(workspace / "claims" / cell.key, waits=False) as is_ours:
                if is_ours:
                    run_missing(cell, report, out, lane)


def run_missing(cell: Cell, report: dict[str, Any], out: Path, lane: Path) -> None:
    """Run a cell unless the report has it, and write what it found, or its last words."""
    workspace = lane.parent
    with shared_report(report, out, workspace):
        attempts = report["failed"].get(cell.key, {}).get("attempts", 0)
        if cell.key in report["cells"] or attempts >= MAX_ATTEMPTS:
            return
    base = workspace / cell.base.folder(report["commit"])
    try:
        with locked(workspace / "claims" / base.name):
            make_base(base, cell.base.settings, report["commit"])
    except CellError as error:
        raise SystemExit(f"{base}: a stage before RL failed: {error}") from error
    try:
        result = run_cell(cell, base, lane.with_name(f"{lane.name}-cell"))
    except CellError as error:
        print(f"{cell.key}: {error}", file=sys.stderr, flush=True)
        with shared_report(report, out, workspace):
            failure = {"reason": str(error), "attempts": attempts + 1, "commit": report["commit"]}
            report["failed"][cell.key] = failure
        return
    with shared_report(report, out, workspace):
        report["failed"].pop(cell.key, None)
        report["cells"][cell.key] = {**cell.labels, **result, "commit": report["commit"]}
    print(cell.key, json.dumps(report["cells"][cell.key]), file=sys.stderr, flush=True)


@contextmanager
def locked(path: Path, *, waits: bool = True, shared: bool = False) -> Iterator[bool]:
    """Whether this process has the lock while this is open. It goes with the process, however that ends.

    Args:
        path: of the lock, without its ending.
        waits: until it is free.
        shared: with others that share it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if waits else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


@contextmanager
def shared_report(report: dict[str, Any], out: Path, workspace: Path) -> Iterator[None]:
    """The report with what other queues have found; nobody else changes it while this is open. Then it is written."""
    with locked(workspace / "report"):
        report.setdefault("failed", {})
        if out.exists():
            found = json.loads(out.read_text())
            report.update({name: found.get(name, {}) for name in ("cells", "failed")})
        yield
        spent = {key for key, failure in report["failed"].items() if failure["attempts"] >= MAX_ATTEMPTS}
        report["unrun"] = [key for key in report["unrun"] if key not in report["cells"] and key not in spent]
        write_json(out, report)


def make_base(base: Path, settings: dict[str, Any], commit: str) -> None:
    """A clone of the code at a commit, in which everything before RL has run."""
    if not base.exists():
        part = base.with_name(base.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(part)], check=True)
        subprocess.run(["git", "checkout", "--quiet", "--detach", commit], cwd=part, check=True)
        edit_params(part / "params.yaml", settings)
        part.rename(base)
    run_pipeline(base, UPSTREAM)


def run_cell(cell: Cell, base: Path, clone: Path) -> dict[str, Any]:
    """RL and evaluation in a clone of the base; deleted afterwards, with what its own cache holds beside the base's."""
    if clone.exists():
        shutil.rmtree(clone)
    subprocess.run(["git", "clone", "--quiet", str(base), str(clone)], check=True)
    shutil.copy(base / "dvc.lock", clone)
    shutil.copy(base / "params.yaml", clone)
    # Hard links: what RL adds goes with the clone, or the base's cache would grow by two models a cell.
    subprocess.run(["cp", "-al", str(base / ".dvc/cache"), str(clone / ".dvc/cache")], check=True)
    edit_params(clone / "params.yaml", cell.settings)
    with PeakMemory() as memory:
        # A stage that is named restores nothing of those before it.
        ran = run_pipeline(clone, (*UPSTREAM, *cell.stages) if cell.stages else ())
    if set(ran) & set(UPSTREAM):
        raise SystemExit(f"{cell.key}: ran {ran}; only RL and evaluation should have")
    judged = {} if cell.stages else read_judged(clone)
    result = judged | read_trained(clone) | {"learner_peak_gib": memory.resident_gib.get("train_policy", 0.0)}
    shutil.rmtree(clone)
    return result


def read_judged(clone: Path) -> dict[str, Any]:
    """What the evaluation of a finished run wrote."""
    judge = json.loads((clone / "metrics/judge.json").read_text())
    names = (
        *("proxy_mean_sft", "proxy_mean_policy", "gold_win_rate", "gold_win_rate_interval", "kl_nats"),
        *("length_ratio", "distinct_2_ratio", "num_prompts"),
    )
    return {name: judge.get(name) for name in names}


def read_trained(clone: Path) -> dict[str, Any]:
    """What the training of a finished run wrote."""
    policy = json.loads((clone / "metrics/policy.json").read_text())
    timings = json.loads((clone / ".slipstream/timings.json").read_text())
    names = (
        *("best_policy_version", "updates", "samples_total", "score_first", "score_last", "kl_nats_last"),
        *("staleness_mean", "staleness_max", "wall_s", "learn_s", "learner_busy_s", "wait_for_rollouts_s"),
        *("generator_busy_s", "evaluate_s", "swap_s", "publish_s"),
    )
    seconds = read_seconds(clone / "plots/policy.csv")
    return {
        **{name: policy.get(name) for name in names},
        "learn_s_per_update": policy["learn_s"] / policy["updates"],
        "wall_s_per_update": policy["wall_s"] / policy["updates"],
        **{f"{name}_of_an_update": statistics.median(values) for name, values in seconds.items() if values},
        "train_policy_s": timings["train_policy"],
        "curve": read_curve(clone / "plots/policy.csv"),
    }


def read_seconds(path: Path) -> dict[str, list[float]]:
    """Seconds of each update but the first, which warms up, and those after which there was an evaluation."""
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("time/learn_s")]
    pairs = [(before, row) for before, row in pairwise(rows) if row["time/evaluate_s"] == before["time/evaluate_s"]]
    return {
        name: [float(row[f"time/{name}"]) - float(before[f"time/{name}"]) for before, row in pairs]
        for name in ("learn_s", "elapsed_s", "publish_s")
    }


def read_curve(path: Path) -> list[dict[str, float]]:
    """The run's evaluations, on validation prompts by the reward model."""
    names = {
        "step": "policy_version",
        "time/elapsed_s": "elapsed_s",
        "rollout/completions_total": "samples",
        "eval/score": "proxy",
        "eval/kl_nats": "kl_nats",
        "eval/completion_tokens": "completion_tokens",
    }
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("eval/score")]
    return [{ours: float(row[name]) for name, ours in names.items() if row.get(name)} for row in rows]


def run_pipeline(clone: Path, stages: tuple[str, ...]) -> list[str]:
    """The stages that ran; with no names the whole pipeline is brought up to date.

    Raises:
        CellError: it failed or took too long.
    """
    command = [sys.executable, "-m", "flows.dvc", *stages]
    log = clone.with_name(clone.name + ".log")
    with log.open("w") as file:
        try:
            done = subprocess.run(
                command,
                cwd=clone,
                env=os.environ | {"PYTHONPATH": "."},
                stdout=file,
                stderr=subprocess.STDOUT,
                check=False,
                timeout=CELL_TIMEOUT_S,
                # Else it would work on in the clone that the next queue deletes, should this one be killed.
                preexec_fn=functools.partial(die_with_parent, signal.SIGTERM),
            )
        except subprocess.TimeoutExpired as error:
            raise CellError(f"took longer than {error.timeout:.0f} s") from error
    lines = log.read_text(errors="replace").splitlines()
    if done.returncode:
        raise CellError(next((line for line in reversed(lines) if line.strip()), f"exit code {done.returncode}"))
    return [line.split("'")[1] for line in lines if line.startswith("Running stage '")]
