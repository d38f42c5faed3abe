"""Bring stages up to date with `dvc repro`, leaving neither a process nor a damaged dvc.lock behind.

`python -m flows.dvc [STAGE...]` is what `make run` calls; without names the whole pipeline is brought up to
date. Everything dvc starts lives under a guard (stages/common/guard.py), which ends it all when this process
ends, however that happens. The guard also means that no code runs between fork and exec, which is unsafe in
Prefect's threaded engine.
"""

import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from flows.lock_file import heal_lock, keep_lock
from stages.common.entry import ENVIRONMENT_DEFAULTS, EXIT_SETTING, die_with_parent, run_entry
from stages.common.errors import RunError, SettingError
from stages.common.process import guard_command, stop_guard

STOP_S = 25.0
"""Seconds a stage has to stop before it is killed."""
_KILLED = 128 + signal.SIGKILL
_RAN = re.compile(r"Running stage '([^']+)'")
_SKIPPED = re.compile(r"Stage '([^']+)' didn't change, skipping")
_RESTORED = re.compile(r"Stage '([^']+)' is cached - skipping run")
_FAILED = re.compile(r"failed to reproduce '([^']+)'")
_EXIT_CODE = re.compile(r"exited with (-?\d+)")

logger = logging.getLogger(__name__)
_running: "set[subprocess.Popen[str]]" = set()
_is_stopping = threading.Event()


@dataclass
class Reproduction:
    """What one `dvc repro` did, and what it said about a failure."""

    ran: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """Unchanged since dvc.lock was written."""
    restored: list[str] = field(default_factory=list)
    """Run before with the same inputs; DVC took the outs from its run cache."""
    failed: str | None = None
    exit_code: int | None = None
    """Of the stage that failed; dvc's own is 255 whatever happened."""
    last_lines: deque[str] = field(default_factory=lambda: deque(maxlen=5))
    """The last lines before dvc reported the failure."""

    def read(self, line: str) -> None:
        """Take in one line of dvc's output."""
        for pattern, names in ((_RAN, self.ran), (_SKIPPED, self.skipped), (_RESTORED, self.restored)):
            if match := pattern.match(line):
                names.append(match[1])
        if match := _FAILED.search(line):
            self.failed = match[1]
        if self.failed and (match := _EXIT_CODE.search(line)):
            self.exit_code = int(match[1])
        elif not self.failed and line.strip():
            self.last_lines.append(line.rstrip())


def print_line(line: str) -> None:
    """Show a line of dvc's output as it comes."""
    sys.stdout.write(line)
    sys.stdout.flush()


def reproduce(
    stage: str | None,
    *,
    pull: bool = False,
    env: Mapping[str, str] | None = None,
    echo: Callable[[str], None] = print_line,
) -> Reproduction:
    """Bring one stage, or with None the whole pipeline, up to date.

    Args:
        stage: its name in dvc.yaml.
        pull: fetch from the DVC remote what the stage needs and this machine lacks.
        env: beside this process's environment.
        echo: told every line of output.

    Raises:
        SettingError: a stage found a wrong setting or input file; running it again will not help.
        RunError: a stage or dvc failed.
    """
    heal_lock()
    result = Reproduction()

    def take(line: str) -> None:
        result.read(line)
        echo(line)

    code = _run(_dvc_command(stage, pull=pull), env or {}, take)
    if code != _KILLED:
        keep_lock()
    if code:
        raise _failure(result, code)
    return result


def run_module(module: str, *, env: Mapping[str, str], echo: Callable[[str], None]) -> None:
    """Run `python -m MODULE` that is no stage of dvc.yaml, as safely as a stage.

    Raises:
        SettingError: it found a wrong setting or input file.
        RunError: it failed.
    """
    result = Reproduction()

    def take(line: str) -> None:
        result.read(line)
        echo(line)

    code = _run([sys.executable, "-m", module], env, take)
    detail = result.last_lines[-1] if result.last_lines else "it said nothing"
    if code == EXIT_SETTING:
        raise SettingError(f"{module}: {detail}")
    if code:
        raise RunError(f"{module} failed with exit code {code}: {detail}")


def stop_all() -> None:
    """End every `dvc repro` of this process and start no other; for a flow that is being cancelled."""
    _is_stopping.set()
    stop_running()


def stop_running() -> None:
    """End what runs now; another attempt may start."""
    for process in list(_running):
        _stop(process)


def allow_start() -> None:
    """Let `reproduce` start again after `stop_all`; a new flow run begins with this."""
    _is_stopping.clear()


def main() -> None:
    """Bring the stages named on the command line, or all, up to date, and link what they made to their runs."""
    from stages.link_runs import link_runs

    die_with_make()
    for stage in sys.argv[1:] or (None,):
        reproduce(stage)
    link_runs(sys.argv[1:])


def die_with_make() -> None:
    """End if `make`, which started us, is killed: nothing else tells us, and the training would go on."""
    if psutil.Process(os.getppid()).name() in ("make", "gmake"):
        die_with_parent(signal.SIGTERM)


def _dvc_command(stage: str | None, *, pull: bool) -> list[str]:
    # Without --wait-for-lock a stage that finished while another dvc holds the lock is thrown away.
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro"]
    if pull:
        command += ["--pull", "--allow-missing"]
    if stage is not None:
        command += ["--single-item", stage]
    return command


def _run(command: list[str], env: Mapping[str, str], take: Callable[[str], None]) -> int:
    """Run a command under guard to its end; returns its exit code."""
    if _is_stopping.is_set():
        raise RunError("this flow is being stopped")
    process = _start(command, env)
    _running.add(process)
    try:
        return _follow(process, take)
    finally:
        # After a normal end this only closes the pipes.
        _stop(process)
        _running.discard(process)


def _start(command: list[str], env: Mapping[str, str]) -> "subprocess.Popen[str]":
    # `python` in dvc.yaml is the one that runs this, whether or not its environment was activated.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return subprocess.Popen(
        guard_command(command),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**ENVIRONMENT_DEFAULTS, **os.environ, **env, "PATH": path, "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )


def _follow(process: "subprocess.Popen[str]", take: Callable[[str], None]) -> int:
    """Pass its output on as it comes; returns its exit code."""
    assert process.stdout is not None
    for line in process.stdout:
        take(line)
    return process.wait()


def _stop(process: "subprocess.Popen[str]") -> None:
    if process.poll() is None:
        process.terminate()
    stop_guard(process, STOP_S)
    if process.stdout is not None:
        process.stdout.close()


def _failure(result: Reproduction, code: int) -> Exception:
    where = result.failed or "dvc repro"
    detail = result.last_lines[-1] if result.last_lines else f"dvc ended with {code}"
    if result.exit_code == EXIT_SETTING:
        return SettingError(f"{where}: {detail}")
    return RunError(f"{where} failed with exit code {result.exit_code or code}: {detail}")


if __name__ == "__main__":
    run_entry(main)
