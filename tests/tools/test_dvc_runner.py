"""A real DVC repository with toy stages."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from flows.dvc import reproduce
from flows.lock_file import GOOD_LOCK
from stages.common.errors import RunError, SettingError

ROOT = Path(__file__).parents[2]
DVC_YAML = """
stages:
  first:
    cmd: python stage.py first
    deps: [stage.py]
    outs: [first.txt]
  second:
    cmd: python stage.py second
    deps: [first.txt]
    outs: [second.txt]
"""
STAGE = """
import pathlib, sys
name = sys.argv[1]
with open("runs.log", "a") as log:
    log.write(name + "\\n")
pathlib.Path(name + ".txt").write_text(name)
"""
SLOW_STAGE = f"""
import os, pathlib, subprocess, sys, time
sys.path.insert(0, {str(ROOT)!r})
from stages.common.entry import run_entry
def main():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"], start_new_session=True)
    pathlib.Path("pids.part").write_text(f"{{os.getpid()}} {{child.pid}}")
    os.replace("pids.part", "pids")
    time.sleep(120)
run_entry(main)
"""


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], check=True, timeout=60)
    Path("dvc.yaml").write_text(DVC_YAML)
    Path("stage.py").write_text(STAGE)
    return tmp_path


def runs() -> list[str]:
    return Path("runs.log").read_text().split()


def wait_for(is_true: Callable[[], bool], timeout_s: float = 40) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, "timed out"
        threading.Event().wait(0.05)


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_what_ran_and_what_was_up_to_date_is_told() -> None:
    everything = reproduce(None)
    one = reproduce("first")

    assert everything.ran == ["first", "second"]
    assert (one.ran, one.skipped) == ([], ["first"])


@pytest.mark.parametrize("kept", [0.0, 0.4, 0.7])
def test_a_truncated_lock_heals_without_running_again(kept: float) -> None:
    reproduce(None)
    lock = Path("dvc.lock")
    text = lock.read_text()
    lock.write_text(text[: int(len(text) * kept)])

    healed = reproduce(None)

    assert runs() == ["first", "second"]
    assert healed.skipped == ["first", "second"]
    assert lock.read_text() == text


def test_a_stage_whose_entry_was_lost_comes_from_the_run_cache() -> None:
    reproduce("first")
    before = GOOD_LOCK.read_text()
    reproduce("second")
    GOOD_LOCK.write_text(before)  # as if killed while `second` was being written
    Path("dvc.lock").write_text("schema: '2.0'\nsta")

    healed = reproduce("second")

    assert runs() == ["first", "second"]
    assert healed.restored == ["second"]


def test_a_lock_cut_between_two_stages_is_seen() -> None:
    reproduce(None)
    text = Path("dvc.lock").read_text()
    Path("dvc.lock").write_text(text[: text.index("  second:")])

    assert reproduce(None).skipped == ["first", "second"]


def test_a_wrong_setting_is_told_from_a_crash() -> None:
    Path("stage.py").write_text("print('rl.lr=-1: must be positive'); raise SystemExit(2)")
    with pytest.raises(SettingError, match=r"first: rl\.lr=-1: must be positive"):
        reproduce("first")

    Path("stage.py").write_text("raise ZeroDivisionError('seven')")
    with pytest.raises(RunError, match="first failed with exit code 1: ZeroDivisionError: seven"):
        reproduce("first")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_ending_the_runner_leaves_no_stage_behind(project: Path, number: signal.Signals) -> None:
    Path("stage.py").write_text(SLOW_STAGE)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    runner = subprocess.Popen(
        [sys.executable, "-m", "flows.dvc", "first"], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_for((project / "pids").exists)
        pids = [int(pid) for pid in (project / "pids").read_text().split()]
        assert all(is_running(pid) for pid in pids)

        runner.send_signal(number)
        runner.wait(40)

        wait_for(lambda: not any(is_running(pid) for pid in pids))
    finally:
        runner.kill()
        runner.wait(10)
    assert runner.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 143)


@pytest.mark.parametrize("shell", ["/bin/sh", "/bin/bash"])
def test_killing_dvc_alone_ends_the_stage(project: Path, monkeypatch: pytest.MonkeyPatch, shell: str) -> None:
    monkeypatch.setenv("SHELL", shell)  # dvc runs commands in it; dash forks where bash becomes the command
    Path("stage.py").write_text(SLOW_STAGE)
    Path("dvc.yaml").write_text(DVC_YAML.replace("cmd: python", "cmd: exec python"))
    runner = subprocess.Popen([sys.executable, "-m", "dvc", "repro", "first"], stdout=subprocess.DEVNULL)
    helper = None
    try:
        wait_for((project / "pids").exists)
        stage, helper = (int(pid) for pid in (project / "pids").read_text().split())

        runner.kill()

        wait_for(lambda: not is_running(stage))
    finally:
        runner.kill()
        runner.wait(10)
        if helper is not None and is_running(helper):  # an unguarded child of the toy stage
            os.kill(helper, signal.SIGKILL)
