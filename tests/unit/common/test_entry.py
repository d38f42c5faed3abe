import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

PROGRAM = """
import errno, os, sys, time
from stages.common.entry import run_entry
from stages.common.errors import InputError, RunError, SettingError
def main():
    {body}
run_entry(main)
"""

Run = Callable[[str], "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run() -> Run:
    def start(body: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-c", PROGRAM.format(body=body)],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=ROOT,
            check=False,
        )

    return start


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ("raise SettingError('rl.lr=-1: must be positive')", 2, "rl.lr=-1: must be positive\n"),
        ("raise InputError('pairs.csv, line 3: no column')", 2, "pairs.csv, line 3: no column\n"),
        ("raise RunError('the generator died')", 1, "the generator died\n"),
        ("raise OSError(errno.ENOSPC, 'full', 'artifacts/sft')", 1, "no space left: artifacts/sft\n"),
        ("raise KeyboardInterrupt", 130, "interrupted\n"),
        ("pass", 0, ""),
    ],
)
def test_what_a_person_can_fix_is_one_line(run: Run, body: str, code: int, message: str) -> None:
    result = run(body)

    assert (result.returncode, result.stderr) == (code, message)


def test_a_full_disk_is_seen_behind_a_library_error(run: Run) -> None:
    result = run("raise ValueError('I/O error: No space left on device (os error 28)')")

    assert result.returncode == 1
    assert result.stderr.startswith("no space left: ")
    assert "Traceback" not in result.stderr


def test_anything_else_is_a_traceback(run: Run) -> None:
    result = run("1 / 0")

    assert result.returncode == 1
    assert "ZeroDivisionError: division by zero" in result.stderr


def test_sigterm_runs_finally_blocks_and_ends_with_143(run: Run) -> None:
    body = "try: os.kill(os.getpid(), 15); time.sleep(30)\n    finally: print('cleaned up')"

    result = run(body)

    assert (result.returncode, result.stdout) == (143, "cleaned up\n")


def test_telemetry_is_off_unless_the_user_set_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_NO_USAGE_STATS", raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "false")

    result = run("print(os.environ['VLLM_NO_USAGE_STATS'], os.environ['MLFLOW_DISABLE_TELEMETRY'])")

    assert result.stdout == "1 false\n"


def test_a_stage_ends_with_the_dvc_that_started_it(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    body = f"open({str(pid_file)!r}, 'w').write(str(os.getpid())); print('up', flush=True); time.sleep(60)"
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])",
            PROGRAM.format(body=body),
        ],
        cwd=ROOT, env={**os.environ, "DVC_STAGE": "train_sft"}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert parent.stdout is not None
    assert parent.stdout.readline() == "up\n"

    parent.send_signal(signal.SIGKILL)
    parent.wait(10)

    assert parent.stdout.read() == ""  # end of file: the stage, which held the pipe, is gone
    parent.stdout.close()
