"""One vLLM server as a deployment of its own: what a worker of pool `generator` runs for a learner elsewhere."""

import contextlib
import json
import logging
import os
import sys
import time
from pathlib import Path

import httpx
from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.exceptions import PrefectHTTPStatusError

from flows.children import read_run
from flows.commands import run_dvc
from flows.devices import VARIABLE as DEVICES_VARIABLE
from flows.devices import hold_devices
from flows.parameters import Parameters
from flows.servers import HOST, is_healthy
from flows.workspace import Workspace, open_workspace
from stages.common.errors import RunError
from stages.common.process import GuardedProcess, free_port, start_guarded

HOST_VARIABLE = "SLIPSTREAM_HOST"
"""Address of this machine at which learners reach it; unset: loopback, for a learner on the same machine."""
MODEL = Path("artifacts/sft")
START_S = 600.0
"""Seconds until vLLM must answer."""
LOOK_EVERY_S = 1.0
OWNER_EVERY_S = 20.0
"""Seconds between two looks at whether the learner still runs."""

logger = logging.getLogger(__name__)


class GeneratorOrder(Parameters):
    """Which model to serve, and for whom."""

    key: str
    """Of the run."""
    slot: int
    """Which of the run's generators this is."""
    repository: str
    revision: str
    has_remote: bool
    owner: str
    """Id of the flow run that trains; this one ends when that has ended."""
    attempt: int
    """Which of the owner's runs: one that is retried starts generators of its own."""


@flow(name="generator", persist_result=False)
def generator(order: GeneratorOrder) -> None:
    """Serve the run's SFT model with vLLM until the learner has ended; it swaps the weights."""
    name = f"{order.key}.generator-{order.slot}"
    with open_workspace(order.key, order.repository, order.revision, name=name) as workspace, hold_devices():
        workspace.finish()  # nothing in it is worth keeping, and it is mostly ended by a kill; nobody deletes it before
        _fetch_model(workspace, has_remote=order.has_remote)
        with contextlib.chdir(workspace.path):  # its settings are those of the run
            url, server = _start_server(workspace.path)
        with server:
            _wait_until_healthy(url, server)
            description = json.dumps({"url": url})
            create_markdown_artifact(
                f"vLLM serves {order.key} at {url}", key=f"generator-{order.slot}", description=description
            )
            get_run_logger().info("serving at %s", url)
            _serve(server, order)


def _fetch_model(workspace: Workspace, *, has_remote: bool) -> None:
    run_dvc(workspace.path, "pull" if has_remote else "checkout", str(MODEL))


def _start_server(folder: Path) -> tuple[str, GuardedProcess]:
    host, port = os.environ.get(HOST_VARIABLE, HOST), free_port()
    command = [sys.executable, "-m", "stages.serve", "--model", str(MODEL), "--host", host, "--port", str(port)]
    kind, _, devices = os.environ.get(DEVICES_VARIABLE, "").partition(":")
    if devices and kind == "cpu":  # of the worker's GPUs it sees no others
        command += ["--devices", devices]
    server = start_guarded(command, log_path=folder / ".slipstream" / "logs" / "generator.log")
    return f"http://{host}:{port}", server


def _wait_until_healthy(url: str, server: GuardedProcess) -> None:
    deadline = time.monotonic() + START_S
    while not is_healthy(f"{url}/health"):
        if server.poll() is not None:
            raise RunError(f"vLLM ended while starting: {server.tail(5)}")
        if time.monotonic() > deadline:
            raise RunError(f"vLLM did not answer at {url} within {START_S:.0f} s: {server.tail(5)}")
        time.sleep(LOOK_EVERY_S)


def _serve(server: GuardedProcess, order: GeneratorOrder) -> None:
    """Return when the learner has ended.

    Raises:
        RunError: the server ended before.
    """
    next_look = time.monotonic() + OWNER_EVERY_S
    while server.poll() is None:
        time.sleep(LOOK_EVERY_S)
        if time.monotonic() >= next_look:
            if _has_ended(order):
                return
            next_look = time.monotonic() + OWNER_EVERY_S
    raise RunError(f"vLLM ended by itself: {server.tail(5)}")


def _has_ended(order: GeneratorOrder) -> bool:
    from uuid import UUID

    try:
        owner = read_run(UUID(order.owner))
    except (httpx.HTTPError, PrefectHTTPStatusError) as error:
        logger.warning("Prefect's server does not answer, serving on: %s", error)
        return False
    return owner.run_count > order.attempt or (owner.state is not None and owner.state.is_final())
