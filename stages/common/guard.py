"""Keep a child process, and all it starts, from outliving its owner. Run as a script, standard library only.

    python -S -E guard.py -- COMMAND...

The owner holds the other end of standard input. The command gets a session of its own; this process adopts
its orphans. It ends with the command's exit code, after everything the command started has been killed.

- standard input closed, or the owner gone (even by SIGKILL): everything is killed at once;
- SIGTERM: the command's process group is asked to stop, and killed after `GRACE_S` seconds;
- SIGINT (Ctrl-C reaches the whole terminal): left to the owner.
"""

import contextlib
import ctypes
import os
import select
import signal
import sys
import time

GRACE_S = 30.0
"""Seconds between SIGTERM and SIGKILL."""
_KILL_FOR_S = 10.0
_OWNER_CHECK_S = 0.5
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def main(command: list[str]) -> int:
    """Run the command under guard; returns its exit code, 128 + N if signal N ended it."""
    owner = os.getppid()
    _set_process_control(_PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    woken = _wake_on_signals()
    child = _start(command)
    exit_code = _watch(child, owner, woken)
    _kill_descendants(child)
    return exit_code


def _start(command: list[str]) -> int:
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
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if os.getppid() == guard:
            os.execvp(command[0], command)
    except OSError as error:
        sys.stderr.write(f"{command[0]}: {error.strerror}\n")
    os._exit(127)


def _watch(child: int, owner: int, woken: int) -> int:
    """Wait until the child ended or must be killed; returns the exit code to leave with."""
    deadline = None
    inputs = [0, woken]
    while True:
        ready, _, _ = select.select(inputs, [], [], _OWNER_CHECK_S)
        numbers = os.read(woken, 512) if woken in ready else b""
        status = _reap(child)
        if status is not None:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        if signal.SIGTERM in numbers and deadline is None:
            deadline = time.monotonic() + GRACE_S
            _kill_group(child, signal.SIGTERM)
        # The pipe may be held open by a fork of the owner, so its life is looked at as well.
        owner_ended = (0 in ready and not os.read(0, 512)) or os.getppid() != owner
        if owner_ended or (deadline is not None and time.monotonic() > deadline):
            return 128 + signal.SIGKILL


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
    """Kill the command's group, then whoever is left by pid; killed parents hand their children to us."""
    _kill_group(child, signal.SIGKILL)
    deadline = time.monotonic() + _KILL_FOR_S
    while time.monotonic() < deadline:
        _reap(child)
        left = _descendants(os.getpid())
        if not left:
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


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


def _kill_group(group: int, number: signal.Signals) -> None:
    # The group is gone, or (macOS) holds only zombies.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


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


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] != "--":
        sys.exit("usage: guard.py -- COMMAND...")
    sys.exit(main(sys.argv[2:]))
