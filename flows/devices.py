"""One device never holds two runs: each core or GPU that a worker names is a global concurrency limit of one.

A lease is renewed while its holder lives, so a killed run frees its devices within `LEASE_S`. While Prefect's server is
away it cannot be renewed, so a run also locks a file for each device, which runs on the same host then wait for.
"""

import fcntl
import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from stages.common.errors import SettingError
from stages.common.guard import parse_cores

VARIABLE = "SLIPSTREAM_DEVICES"
"""What this worker may use, such as `cpu:0-1` or `gpu:0,2`; its worker sets it. Unset: nothing is held."""
LEASE_S = 60.0
"""Prefect allows no less."""
FOLDER = Path(tempfile.gettempdir()) / f"slipstream-devices-{os.getuid()}"
"""Of the lock files."""


def list_devices(text: str) -> list[str]:
    """Names of the limits: `cpu:0-1` on host n1 are `n1-cpu0` and `n1-cpu1`.

    Raises:
        SettingError: the text is anything else.
    """
    kind, colon, numbers = text.partition(":")
    problem = f"{VARIABLE}={text!r}: expected cpu: or gpu: and numbers or rising ranges, such as cpu:0-1 or gpu:0,2"
    if not colon or kind not in ("cpu", "gpu"):
        raise SettingError(problem)
    try:
        return [f"{socket.gethostname()}-{kind}{number}" for number in sorted(parse_cores(numbers))]
    except ValueError as error:
        raise SettingError(problem) from error


@contextmanager
def hold_devices() -> Iterator[None]:
    """Wait for this worker's devices, and hold them. Inside a Prefect run."""
    text = os.environ.get(VARIABLE)
    if not text:
        yield
        return
    from prefect.concurrency.sync import concurrency

    # strict: a limit that nobody made would hold nobody back. A renewal that fails, because the server is away, must
    # not end a training that has run for hours.
    names = list_devices(text)
    with (
        concurrency(names, occupy=1, strict=True, lease_duration=LEASE_S, raise_on_lease_renewal_failure=False),
        lock_devices(names, FOLDER),
    ):
        yield


@contextmanager
def lock_devices(names: Sequence[str], folder: Path) -> Iterator[None]:
    """Wait until no other process of this host has locked any of these devices, and lock them.

    The locks go with the process, however it ends.
    """
    folder.mkdir(exist_ok=True)
    with ExitStack() as stack:
        for name in sorted(names):  # in one order for all: two runs never wait for each other
            fcntl.flock(stack.enter_context((folder / f"{name}.lock").open("w")), fcntl.LOCK_EX)
        yield
