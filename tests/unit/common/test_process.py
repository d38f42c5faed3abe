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

from stages.common.guard import parse_cores
from stages.common.process import free_port, guard_command, start_guarded, stop_guard

ROOT = Path(__file__).parents[3]
SHM = Path("/dev/shm")
needs_shm = pytest.mark.skipif(not SHM.is_dir(), reason="shared memory is no file here")
needs_cores = pytest.mark.skipif(
    sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2, reason="needs two cores to choose from"
)

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
import pathlib, signal, sys, time
from stages.common.process import start_guarded
code, path, *remove = sys.argv[1:]
server = start_guarded(
    [sys.executable, "-c", code, path], log_path=pathlib.Path(path + ".log"), remove=list(map(pathlib.Path, remove))
)
signal.signal(signal.SIGTERM, lambda *_: server.stop())
time.sleep(120)
"""
# Asked to stop, it ends its child and with 100 + the child's exit code; the child can look for its own SIGTERM.
ASKED = """
import signal, subprocess, sys
code = "import signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM}); print('up', flush=True); "
def end(*_):
    child.stdin.close()
    sys.exit(100 + child.wait())
child = subprocess.Popen([sys.executable, "-c", code + sys.argv[1]], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
signal.signal(signal.SIGTERM, end)
print(child.stdout.readline().decode().strip(), flush=True)
signal.pause()
"""
# Its child makes a segment of shared memory, which the resource tracker that both use must unlink.
SHARING_SERVER = """
import multiprocessing, os, sys, time
from multiprocessing import resource_tracker, shared_memory
def share():
    segment = shared_memory.SharedMemory(create=True, size=64)
    with open(sys.argv[1] + ".part", "w") as file:
        file.write(f"{os.getppid()} {os.getpid()} {resource_tracker._resource_tracker._pid} {segment.name}")
    os.replace(sys.argv[1] + ".part", sys.argv[1])
    time.sleep(120)
resource_tracker.ensure_running()
multiprocessing.get_context("fork").Process(target=share).start()
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


def read_words(path: Path) -> list[str]:
    wait_for(path.exists)
    return path.read_text().split()


def read_pids(path: Path) -> list[int]:
    return [int(pid) for pid in read_words(path)]


def make_weights(folder: Path) -> list[Path]:
    """A file and a directory that a server was given."""
    (folder / "weights" / "layer").mkdir(parents=True)
    (folder / "weights" / "layer" / "0.bin").write_text("0")
    (folder / "weights.bin").write_text("1")
    return [folder / "weights", folder / "weights.bin"]


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


def test_a_server_is_asked_alone_and_ends_its_children_itself(tmp_path: Path) -> None:
    child = "sys.stdin.read(); sys.exit(signal.SIGTERM in signal.sigpending())"
    with start_guarded([sys.executable, "-c", ASKED, child], log_path=tmp_path / "log") as server:
        wait_for(lambda: "up" in server.tail())

        assert server.stop() == 100


def test_a_guard_command_asks_the_whole_group() -> None:
    child = "sys.exit(signal.sigwait({signal.SIGTERM}))"
    command = guard_command([sys.executable, "-c", ASKED, child])
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()

        process.terminate()

        assert stop_guard(process, 10) == 100 + signal.SIGTERM


@needs_cores
def test_what_a_command_starts_runs_on_its_cores_whatever_ours_are(tmp_path: Path) -> None:
    ours, theirs = sorted(os.sched_getaffinity(0))[:2]
    owner = f"""
import os, pathlib, sys
from stages.common.process import start_guarded
os.sched_setaffinity(0, {{{ours}}})
grandchild = "import os; print(os.sched_getaffinity(0), flush=True)"
code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {{grandchild!r}}])"
server = start_guarded([sys.executable, "-c", code], log_path=pathlib.Path(sys.argv[1]), cores="{theirs}")
server._process.wait()
assert os.sched_getaffinity(0) == {{{ours}}}
"""

    subprocess.run([sys.executable, "-c", owner, str(tmp_path / "log")], cwd=ROOT, check=True, timeout=60)

    assert (tmp_path / "log").read_text().strip() == str({theirs})


@needs_cores
def test_cores_that_do_not_exist_are_named(tmp_path: Path) -> None:
    with start_guarded(["true"], log_path=tmp_path / "log", cores="9998-9999") as server:
        wait_for(lambda: server.poll() is not None)

        assert server.poll() == 127
        assert server.tail() == "true: cannot run on cores [9998, 9999]"


@pytest.mark.parametrize(("text", "cores"), [("0", {0}), ("0-1", {0, 1}), ("0,2-4", {0, 2, 3, 4}), ("7,7,6-7", {6, 7})])
def test_cores_are_numbers_and_ranges(text: str, cores: set[int]) -> None:
    assert parse_cores(text) == cores


@pytest.mark.parametrize("text", ["", "a", "-1", "1-", "3-1", "0,,1", "0, 1", "0-1-2", "1.5", "99999"])
def test_anything_else_is_refused_before_a_start(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=f"cores {text!r}: expected numbers and rising ranges"):
        start_guarded(["true"], log_path=tmp_path / "log", cores=text)

    assert not (tmp_path / "log").exists()


def test_an_owner_that_lives_keeps_its_weights_when_a_server_ends(tmp_path: Path) -> None:
    weights = make_weights(tmp_path)
    command = [sys.executable, "-c", SERVER, str(tmp_path / "pids")]
    with start_guarded(command, log_path=tmp_path / "log", remove=weights):
        pids = read_pids(tmp_path / "pids")

    assert all(path.exists() for path in weights)
    assert not any(is_running(pid) for pid in pids)


def test_a_stop_right_after_the_start_is_one(tmp_path: Path) -> None:
    with start_guarded(["sleep", "120"], log_path=tmp_path / "log") as server:
        assert server.stop() == 128 + signal.SIGTERM


def test_a_group_that_is_asked_to_stop_has_time_for_it(tmp_path: Path) -> None:
    # As dvc and the stage that it runs: the first ends at once, its child has something to write.
    child = (
        "import signal, time, pathlib, sys\n"
        "def end(*_):\n    time.sleep(1); pathlib.Path(sys.argv[1], 'written').touch(); sys.exit()\n"
        "signal.signal(signal.SIGTERM, end); pathlib.Path(sys.argv[1], 'up').touch(); time.sleep(60)"
    )
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"
    command = guard_command([sys.executable, "-c", parent, child, str(tmp_path)])
    process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    wait_for((tmp_path / "up").exists)

    process.terminate()

    assert stop_guard(process, 20) == 128 + signal.SIGTERM
    assert (tmp_path / "written").exists()


def test_removing_spares_what_a_link_points_to(tmp_path: Path) -> None:
    make_weights(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "weights")
    command = [
        sys.executable,
        "-c",
        OWNER,
        SERVER,
        str(tmp_path / "pids"),
        *map(str, (tmp_path / "link", tmp_path / "none")),
    ]
    owner = subprocess.Popen(command, cwd=ROOT)
    try:
        read_pids(tmp_path / "pids")
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.wait(10)

    wait_for(lambda: not (tmp_path / "link").is_symlink())
    assert (tmp_path / "weights" / "layer" / "0.bin").exists()


def test_weights_are_removed_after_all_is_dead_when_the_owner_was_killed(tmp_path: Path) -> None:
    weights = make_weights(tmp_path)
    command = [sys.executable, "-c", OWNER, SERVER, str(tmp_path / "pids"), *map(str, weights)]
    owner = subprocess.Popen(command, cwd=ROOT)
    try:
        pids = read_pids(tmp_path / "pids")
        assert all(path.exists() for path in weights)
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.wait(10)

    wait_for(lambda: not all(path.exists() for path in weights))
    assert not any(is_running(pid) for pid in pids)
    wait_for(lambda: not any(path.exists() for path in weights))


def test_a_directory_for_temporary_files_is_deleted_with_what_a_killed_command_left_in_it(tmp_path: Path) -> None:
    script = "import os, sys, tempfile; print(tempfile.mkstemp()[1], flush=True); os.kill(os.getpid(), 9)"
    with start_guarded([sys.executable, "-c", script], log_path=tmp_path / "log", temporary=True) as process:
        wait_for(lambda: process.poll() is not None)

    left = Path((tmp_path / "log").read_text().strip())
    assert left.parent.name.startswith("slipstream-")
    assert not left.parent.exists()


@needs_shm
@pytest.mark.parametrize("end", ["stop", "kill the owner", "kill the command"])
def test_a_server_leaves_no_shared_memory(tmp_path: Path, end: str) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, SHARING_SERVER, str(tmp_path / "pids")], cwd=ROOT)
    try:
        *pids, name = read_words(tmp_path / "pids")
        assert (SHM / name).exists()

        if end == "kill the command":
            os.kill(int(pids[0]), signal.SIGKILL)
        else:
            owner.send_signal(signal.SIGTERM if end == "stop" else signal.SIGKILL)

        wait_for(lambda: not any(is_running(int(pid)) for pid in pids))
        assert not (SHM / name).exists()
    finally:
        owner.kill()
        owner.wait(10)


@needs_shm
@pytest.mark.parametrize("trackers_have_s", [0.2, 60])
def test_a_tracker_gets_its_time_and_no_more(tmp_path: Path, trackers_have_s: float) -> None:
    code = f"""
import sys
from stages.common import guard
guard._TRACKERS_HAVE_S = {trackers_have_s}
guard.main(sys.argv[1:])
"""
    server = [sys.executable, "-c", SHARING_SERVER, str(tmp_path / "pids")]
    process = subprocess.Popen([sys.executable, "-c", code, *server], stdin=subprocess.PIPE, cwd=ROOT)
    *names, segment = read_words(tmp_path / "pids")
    main, child, tracker = map(int, names)
    os.kill(tracker, signal.SIGSTOP)

    os.kill(main, signal.SIGKILL)
    if trackers_have_s > 1:
        wait_for(lambda: not is_running(child))
        os.kill(tracker, signal.SIGCONT)
    stop_guard(process, 10)

    assert not is_running(tracker)
    # Only a tracker that went on unlinks.
    assert (SHM / segment).exists() == (trackers_have_s < 1)
    (SHM / segment).unlink(missing_ok=True)


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
