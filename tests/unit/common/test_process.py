"""Real processes; only those started here are signalled."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from stages.common.process import free_port, start_guarded

ROOT = Path(__file__).parents[3]

# A server whose child has a session of its own and ignores SIGTERM, as an engine process may.
SERVER = """
import os, signal, subprocess, sys, time
code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(120)"
child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
child.stdout.readline()
with open(sys.argv[1] + ".part", "w") as file:
    file.write(f"{os.getpid()} {child.pid}")
os.replace(sys.argv[1] + ".part", sys.argv[1])
print("serving", flush=True)
time.sleep(120)
"""
OWNER = """
import pathlib, sys, time
from stages.common.process import start_guarded
server = start_guarded([sys.executable, "-c", sys.argv[1], sys.argv[2]], log_path=pathlib.Path(sys.argv[2] + ".log"))
time.sleep(120)
"""


def wait_for(is_true: Callable[[], bool], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, "timed out"
        threading.Event().wait(0.02)


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def read_pids(path: Path) -> list[int]:
    wait_for(path.exists)
    return [int(pid) for pid in path.read_text().split()]


def test_a_killed_owner_leaves_no_server_and_no_grandchild(tmp_path: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, SERVER, str(tmp_path / "pids")], cwd=ROOT)
    try:
        pids = read_pids(tmp_path / "pids")
        assert all(is_running(pid) for pid in pids)
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.wait(10)

    wait_for(lambda: not any(is_running(pid) for pid in pids))


def test_a_killed_owner_is_noticed_while_its_fork_holds_the_pipe(tmp_path: Path) -> None:
    forking = OWNER.replace("time.sleep(120)", "import os; os.fork() or time.sleep(6) or os._exit(0); time.sleep(120)")
    owner = subprocess.Popen([sys.executable, "-c", forking, SERVER, str(tmp_path / "pids")], cwd=ROOT)
    try:
        pids = read_pids(tmp_path / "pids")
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.wait(10)

    wait_for(lambda: not any(is_running(pid) for pid in pids))


def test_stop_kills_what_ignores_the_request(tmp_path: Path) -> None:
    with start_guarded([sys.executable, "-c", SERVER, str(tmp_path / "pids")], log_path=tmp_path / "log") as server:
        pids = read_pids(tmp_path / "pids")
        wait_for(lambda: "serving" in server.tail())
        assert server.poll() is None

        assert server.stop(timeout_s=5) == 128 + signal.SIGTERM

    assert not any(is_running(pid) for pid in pids)


def test_a_server_that_ends_takes_its_children_along(tmp_path: Path) -> None:
    with start_guarded([sys.executable, "-c", SERVER, str(tmp_path / "pids")], log_path=tmp_path / "log") as server:
        main, child = read_pids(tmp_path / "pids")

        os.kill(main, signal.SIGKILL)

        wait_for(lambda: server.poll() is not None)
        assert server.poll() == 128 + signal.SIGKILL
        assert not is_running(child)


@pytest.mark.parametrize(
    ("command", "code"), [(["sh", "-c", "echo one; echo two; exit 7"], 7), (["no-such-command"], 127)]
)
def test_the_exit_code_and_the_last_lines_are_the_commands(tmp_path: Path, command: list[str], code: int) -> None:
    with start_guarded(command, log_path=tmp_path / "logs" / "server.log") as server:
        wait_for(lambda: server.poll() is not None)

        assert server.poll() == code
        assert server.tail(1) == ("two" if code == 7 else "no-such-command: No such file or directory")


def test_the_environment_is_the_one_given(tmp_path: Path) -> None:
    with start_guarded(["/bin/sh", "-c", "echo $A"], env={"A": "5"}, log_path=tmp_path / "log") as server:
        wait_for(lambda: server.poll() is not None)

        assert server.tail() == "5"


def test_a_free_port_can_be_bound() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", free_port()))
