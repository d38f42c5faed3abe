"""Servers and tools we start: nothing they start outlives us, whatever ends us (see guard.py)."""

import contextlib
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
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


def start_guarded(command: Sequence[str], *, env: Mapping[str, str] | None = None, log_path: Path) -> GuardedProcess:
    """Start a command whose output goes to `log_path`. `env` is its whole environment; None is ours."""
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            guard_command(command),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=None if env is None else dict(env),
            # A kill of our whole process group must not reach the guard: it has to clean up after us.
            start_new_session=True,
        )
    return GuardedProcess(process, log_path)


def guard_command(command: Sequence[str]) -> list[str]:
    """The command line that runs `command` under guard; its standard input must be a pipe we hold."""
    # -S and -E: no site-packages and no PYTHON* variables, so it starts fast and cannot be broken by them.
    return [sys.executable, "-S", "-E", str(Path(guard.__file__).resolve()), "--", *command]


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
