"""Keep a child process, and all it starts, from outliving its owner. Run as a script, standard library only.

    python -S -E guard.py [--cores 0,2-3] [--remove PATH]... [--signal-group] [--temporary] -- COMMAND...

The owner holds the other end of standard input. The command gets a session of its own; this process adopts
its orphans. It ends with the command's exit code, after everything the command started has been killed. If the
owner is gone too, it deletes the `--remove` paths, which an owner that lives looks after itself. With `--temporary`
the command's TMPDIR is a directory of its own, deleted when it ended: killed processes leave sockets and files there.

- standard input closed, or the owner gone (even by SIGKILL): everything is killed at once;
- SIGTERM: the command is asked to stop, and everything is killed when it ended, at the latest after `GRACE_S`
  seconds; with `--signal-group` its whole process group is asked, and all of it has that time;
- SIGINT (Ctrl-C reaches the whole terminal): left to the owner.

Python's resource trackers are killed last: they unlink the shared memory of processes that cannot any more.
"""

import argparse
import contextlib
import ctypes
import os
import re
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence

GRACE_S = 30.0
"""Seconds between SIGTERM and SIGKILL."""
_KILL_FOR_S = 10.0
_TRACKERS_HAVE_S = 3.0
_TRACKER = b"resource_tracker import main"
"""In the command line of a resource tracker, that of multiprocessing as well as joblib's."""
_OWNER_CHECK_S = 0.5
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def parse_cores(text: str) -> set[int]:
    """The CPU cores named by numbers and ranges, such as `0,2-3`.

    Raises:
        ValueError: the text is anything else.
    """
    cores: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,4})(?:-([0-9]{1,4}))?", part)
        named = range(int(match[1]), int(match[2] or match[1]) + 1) if match else ()
        if not named:
            raise ValueError(f"cores {text!r}: expected numbers and rising ranges, such as 0 or 0,2-3")
        cores.update(named)
    return cores


def main(
    command: list[str],
    *,
    cores: set[int] | None = None,
    remove: Sequence[str] = (),
    signal_group: bool = False,
    temporary: bool = False,
) -> int:
    """Run the command under guard; returns its exit code, 128 + N if signal N ended it."""
    # A SIGTERM waits until we, and the command, are ready for it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    owner = os.getppid()
    _set_process_control(_PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    woken = _wake_on_signals()
    directory = tempfile.mkdtemp(prefix="slipstream-") if temporary else None
    if directory is not None:
        os.environ["TMPDIR"] = directory
    child = _start(command, cores)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    exit_code = _watch(child, owner, woken, -child if signal_group else child)
    _kill_descendants(child)
    if directory is not None:
        _remove(directory)
    for path in remove if os.getppid() != owner else ():
        _remove(path)
    return exit_code


def _start(command: list[str], cores: set[int] | None) -> int:
    """Start the command in its own session; it is killed should this process be."""
    guard = os.getpid()
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        _set_process_control(_PR_SET_PDEATHSIG, signal.SIGKILL)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        _pin(cores)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if os.getppid() == guard:
            os.execvp(command[0], command)
    except OSError as error:
        sys.stderr.write(f"{command[0]}: {error.strerror}\n")
    os._exit(127)


def _pin(cores: set[int] | None) -> None:
    """Run this process, and all it starts, on these cores."""
    if sys.platform == "linux" and cores is not None:
        try:
            os.sched_setaffinity(0, cores)
        except OSError as error:
            raise OSError(error.errno, f"cannot run on cores {sorted(cores)}") from error


def _watch(child: int, owner: int, woken: int, asked: int) -> int:
    """Wait until the child ended or must be killed; returns the exit code to leave with.

    `asked` is the process, or minus the group, that SIGTERM is passed on to.
    """
    deadline: float | None = None
    code: int | None = None
    inputs = [0, woken]
    while True:
        ready, _, _ = select.select(inputs, [], [], _OWNER_CHECK_S)
        numbers = os.read(woken, 512) if woken in ready else b""
        status = _reap(child)
        if status is not None:
            number = os.waitstatus_to_exitcode(status)
            code = number if number >= 0 else 128 - number
        # A group that was asked to stop has time for it although its first process is gone: dvc ends at once,
        # the stage that it runs writes a checkpoint.
        has_time = deadline is not None and asked < 0 and _descendants(os.getpid())
        if code is not None and not has_time:
            return code
        if signal.SIGTERM in numbers and deadline is None:
            deadline = time.monotonic() + GRACE_S
            _signal(asked, signal.SIGTERM)
        # The pipe may be held open by a fork of the owner, so its life is looked at as well.
        owner_ended = (0 in ready and not os.read(0, 512)) or os.getppid() != owner
        if owner_ended or (deadline is not None and time.monotonic() > deadline):
            return 128 + signal.SIGKILL if code is None else code


def _reap(child: int) -> int | None:
    """Collect every child that ended, adopted ones too; the command's wait status if it is among them."""
    found = None
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            if pid == child:
                found = status
    return found


def _kill_descendants(child: int) -> None:
    """Kill all below us, resource trackers last; killed parents hand their children to us.

    A tracker ends by itself when all it works for are dead, after it unlinked what they left.
    """
    if not os.path.isdir("/proc"):
        _signal(-child, signal.SIGKILL)
    started = time.monotonic()
    while (spent_s := time.monotonic() - started) < _KILL_FOR_S:
        _reap(child)
        left = _descendants(os.getpid())
        if not left:
            return
        for pid in left:
            if spent_s > _TRACKERS_HAVE_S or not _is_tracker(pid):
                _signal(pid, signal.SIGKILL)
        time.sleep(0.02)


def _is_tracker(pid: int) -> bool:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
        return _TRACKER in file.read()
    return False


def _descendants(root: int) -> list[int]:
    """Pids below `root`, from /proc; empty where there is no /proc."""
    children: dict[int, list[int]] = {}
    if os.path.isdir("/proc"):
        for name in filter(str.isdigit, os.listdir("/proc")):
            # A process may end while it is being looked at.
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                # The name in brackets may hold spaces; the parent is the second field after it.
                parent = int(file.read().rpartition(b")")[2].split()[1])
                children.setdefault(parent, []).append(int(name))
    found: list[int] = []
    todo = [root]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def _signal(target: int, number: signal.Signals) -> None:
    """Send a signal to a process, or to a group given as its negative number."""
    # The target is gone, or (macOS) a group holds only zombies.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(target, number)


def _remove(path: str) -> None:
    """Delete a file, or a directory with all in it, if it is there."""
    try:
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        sys.stderr.write(f"cannot remove {path}: {error.strerror}\n")


def _wake_on_signals() -> int:
    """A descriptor that becomes readable when a child ends or SIGTERM comes; one byte per signal."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    os.set_blocking(reader, False)
    signal.set_wakeup_fd(writer)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    return reader


def _set_process_control(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, int(value), 0, 0, 0)


def _run(arguments: list[str]) -> int:
    # Everything after the first `--` is the command's, whatever it looks like.
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(usage="guard.py [OPTION]... -- COMMAND...", allow_abbrev=False)
    parser.add_argument("--cores", type=parse_cores)
    parser.add_argument("--remove", action="append", default=[])
    parser.add_argument("--signal-group", action="store_true")
    parser.add_argument("--temporary", action="store_true")
    options = parser.parse_args(arguments[:split])
    command = arguments[split + 1 :]
    if not command:
        parser.error("no command")
    return main(command, **vars(options))


if __name__ == "__main__":
    sys.exit(_run(sys.argv[1:]))
