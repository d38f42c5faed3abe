"""Servers and tools we start: nothing they start outlives us, whatever ends us (see guard.py)."""

import contextlib
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from stages.common import guard

_TAIL_BYTES = 256 * 1024


class GuardedProcess:
    """A running command under guard. Use it as a context manager, or call `stop`."""

    def __init__(self, process: "subprocess.Popen[bytes]", log_path: Path) -> None:
        self._process = process
        self.log_path = log_path

    @property
    def pid(self) -> int:
        """Pid of the guard; the command is its child."""
        return self._process.pid

    def poll(self) -> int | None:
        """The command's exit code (128 + N if signal N ended it), or None while it runs."""
        return self._process.poll()

    def stop(self, timeout_s: float = 10.0) -> int:
        """Ask the command to stop, kill all it started after `timeout_s` (≤ guard.GRACE_S); its exit code."""
        if self.poll() is None:
            self._process.terminate()
        return stop_guard(self._process, timeout_s)

    def tail(self, n: int = 20) -> str:
        """The last `n` lines the command wrote."""
        with self.log_path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
        return "\n".join(lines[-n:])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def start_guarded(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    log_path: Path,
    cores: str | None = None,
    remove: Sequence[Path] = (),
    temporary: bool = False,
) -> GuardedProcess:
    """Start a server whose output goes to `log_path`; asked to stop, it ends its own children.

    Args:
        command: program and arguments.
        env: its whole environment; None is ours.
        log_path: appended to; its directory is made.
        cores: CPU cores for it and all it starts, such as `0,2-3`; None is ours. Ignored outside Linux.
        remove: files and directories deleted once all it started is dead, if we are too.
        temporary: give it a TMPDIR of its own, deleted once all it started is dead.

    Raises:
        ValueError: `cores` is no list of cores.
    """
    guarded = guard_command(command, cores=cores, remove=remove, signal_group=False, temporary=temporary)
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("ab") as log, _sigterm_blocked():
        process = subprocess.Popen(
            guarded,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=None if env is None else dict(env),
            # A kill of our whole process group must not reach the guard: it has to clean up after us.
            start_new_session=True,
        )
    return GuardedProcess(process, log_path)


def guard_command(
    command: Sequence[str],
    *,
    cores: str | None = None,
    remove: Sequence[Path] = (),
    signal_group: bool = True,
    temporary: bool = False,
) -> list[str]:
    """The command line that runs `command` under guard; its standard input must be a pipe we hold.

    `cores`, `remove` and `temporary` are those of `start_guarded`. With `signal_group` SIGTERM reaches the command's
    whole process group, else the command alone.
    """
    options = ["--signal-group"] if signal_group else []
    options += ["--temporary"] if temporary else []
    if cores is not None:
        guard.parse_cores(cores)
        options += ["--cores", cores]
    for path in remove:
        options += ["--remove", str(path.absolute())]
    # -S and -E: no site-packages and no PYTHON* variables, so it starts fast and cannot be broken by them.
    return [sys.executable, "-S", "-E", str(Path(guard.__file__).resolve()), *options, "--", *command]


@contextlib.contextmanager
def _sigterm_blocked() -> Iterator[None]:
    """A guard started meanwhile takes a SIGTERM when it is ready: a stop right away skips no clean-up."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def stop_guard(process: "subprocess.Popen[Any]", timeout_s: float) -> int:
    """Wait for a guard that was asked to stop; after `timeout_s` close its input: it kills everything."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout_s)
    if process.stdin is not None:
        process.stdin.close()
    return process.wait()


def free_port() -> int:
    """A port on the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
