"""Processes that a test starts to kill them: none outlives it, and none is waited for without end."""

import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def watched(
    command: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: Path | None = None,
    timeout_s: float,
    **streams: IO[Any] | int,
) -> Iterator["subprocess.Popen[str]"]:
    """The process, killed at the block's end or after `timeout_s`: whoever reads its output then reads its end."""
    with subprocess.Popen(command, env=env, cwd=cwd, text=True, **streams) as process:
        timer = threading.Timer(timeout_s, process.kill)
        timer.start()
        try:
            yield process
        finally:
            timer.cancel()
            process.kill()
