"""Prefect's and MLflow's servers as child processes: how they are started, and when they are ready.

They listen on the loopback interface, send no telemetry, and keep what they hold under one folder, or in a
database that is named.
"""

import os
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from stages.common.entry import ENVIRONMENT_DEFAULTS
from stages.common.errors import RunError
from stages.common.process import GuardedProcess, start_guarded

HOST = "127.0.0.1"
START_S = 180.0
"""Seconds a server may take to answer; a first start makes its tables."""
_POLL_S = 0.25

PREFECT_SERVER = {
    "DO_NOT_TRACK": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    # Kept in memory, a lease dies with the server, and with it the run that holds a device.
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    # A run whose process was killed waits for its own lease; by default up to 54 s more after that has run out.
    "PREFECT_SERVER_SERVICES_REPOSSESSOR_LOOP_SECONDS": "5",
    "PREFECT_SERVER_CONCURRENCY_MAXIMUM_CONCURRENCY_SLOT_WAIT_SECONDS": "5",
}
"""Settings of Prefect's server."""

MLFLOW_SERVER = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_MODEL_CATALOG_URI": "",
    # Jobs are for MLflow's own judges; they cost seven processes.
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}
"""Settings of MLflow's server."""


@dataclass(frozen=True)
class ServerCommand:
    """How a server is started, and where it answers."""

    name: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    """On top of ours."""
    url: str
    """Of its page; Prefect's API is at `/api` below it."""
    health: str
    """Path that answers 200 as long as the process serves, whatever its database does."""
    ready: str
    """Path that answers 200 if its database answers too."""
    log_path: Path

    def launch(self) -> GuardedProcess:
        """Start it; it answers some seconds later."""
        environment = {**os.environ, **ENVIRONMENT_DEFAULTS, **self.environment}
        return start_guarded(self.arguments, env=environment, log_path=self.log_path)


@dataclass
class Server:
    """A server that answers; as a context manager it is stopped at the end."""

    name: str
    url: str
    """Of its page; Prefect's API is at `/api` below it."""
    process: GuardedProcess

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.stop()


def start_prefect(folder: Path, port: int, *, database: str | None = None) -> Server:
    """Prefect's server, its page and API; the arguments are those of `describe_prefect`.

    Raises:
        RunError: it ended, or did not answer within `START_S`.
    """
    return _start(describe_prefect(folder, port, database=database))


def start_mlflow(folder: Path, port: int, *, database: str | None = None) -> Server:
    """MLflow's server: its page and stores; the arguments are those of `describe_mlflow`.

    Raises:
        RunError: it ended, or did not answer within `START_S`.
    """
    return _start(describe_mlflow(folder, port, database=database))


def describe_prefect(folder: Path, port: int, *, database: str | None = None) -> ServerCommand:
    """How Prefect's server is started.

    Args:
        folder: its files and log.
        port: on the loopback interface.
        database: SQLAlchemy's address (`postgresql+asyncpg://…`); None is a SQLite file in `folder`.
    """
    url = f"http://{HOST}:{port}"
    arguments = (sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port))
    environment = {
        **PREFECT_SERVER,
        "PREFECT_HOME": str(folder.absolute() / "prefect"),
        "PREFECT_API_URL": f"{url}/api",
        "PREFECT_UI_API_URL": f"{url}/api",
    }
    if database is not None:
        environment["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = database
    return ServerCommand("prefect", arguments, environment, url, "/api/health", "/api/ready", folder / "prefect.log")


def describe_mlflow(folder: Path, port: int, *, database: str | None = None) -> ServerCommand:
    """How MLflow's server is started; it hands artifacts through.

    Args:
        folder: its files and log.
        port: on the loopback interface.
        database: SQLAlchemy's address (`postgresql+psycopg2://…`); None is a SQLite file in `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # A log of every request grows by megabytes a day, of health checks alone.
    listen = ("--host", HOST, "--port", str(port), "--workers", "1", "--uvicorn-opts", "--no-access-log")
    artifacts = ("--artifacts-destination", str(folder.absolute() / "mlartifacts"))
    # Not on the command line, which every user of the machine can read: an address may hold a password.
    environment = {**MLFLOW_SERVER, "MLFLOW_BACKEND_STORE_URI": database or f"sqlite:///{folder.absolute()}/mlflow.db"}
    ready = "/api/2.0/mlflow/experiments/search?max_results=1"
    arguments = (sys.executable, "-m", "mlflow", "server", *listen, *artifacts)
    url = f"http://{HOST}:{port}"
    return ServerCommand("mlflow", arguments, environment, url, "/health", ready, folder / "mlflow.log")


def is_healthy(url: str, timeout_s: float = 2.0) -> bool:
    """Whether a GET of this address answers 200."""
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _start(server: ServerCommand) -> Server:
    process = server.launch()
    deadline = time.monotonic() + START_S
    while not is_healthy(server.url + server.health):
        if process.poll() is not None or time.monotonic() > deadline:
            code = process.stop()
            raise RunError(
                f"{server.name} on {server.url} did not start (exit code {code}); "
                f"{server.log_path} ends:\n{process.tail(5)}"
            )
        threading.Event().wait(_POLL_S)
    return Server(server.name, server.url, process)
