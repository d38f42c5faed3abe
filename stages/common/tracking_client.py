"""The connection to MLflow: which store, with which limits, and what counts as an outage."""

import logging
import os
import re
import socket
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import getproxies

from stages.common.event_log import file_lock

if TYPE_CHECKING:
    from mlflow import MlflowClient

SERVICES_URI = Path(".slipstream/services/tracking_uri")
"""Holds the address of the project's own MLflow server while it is up (`make services`)."""
_CLIENT_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # by default a call to a dead server blocks for four minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",  # loses data in an outage and reports success
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # else every end of a run says so on standard output
}
REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"}
"""Answers that sending again would not change."""
_PROBE_S = 2.0


def tracking_uri() -> str:
    """`MLFLOW_TRACKING_URI`, or the project's own server if it is up, or a SQLite file in the project's folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or _read_services_uri() or local_uri()


def local_uri() -> str:
    """The SQLite file in the project's folder."""
    # Absolute, because MLflow keeps one store per URI for the life of the process.
    return f"sqlite:///{Path('mlflow.db').resolve()}"


def artifact_location() -> str | None:
    """Where a new experiment's files go: beside the SQLite file, whichever folder a stage runs in; None: the server's.

    MLflow itself would take the present folder, which may be a run's clone that is deleted one day.
    """
    scheme, _, path = tracking_uri().partition(":///")
    return (Path(path).resolve().parent / "mlruns").as_uri() if scheme == "sqlite" and path else None


def is_absent() -> bool:
    """Whether nothing listens at the server's address. Known at once, where MLflow would be imported and try again."""
    try:
        parts = urlsplit(tracking_uri())
        port = parts.port or (443 if parts.scheme == "https" else 80)
        if parts.scheme not in ("http", "https") or getproxies():  # a proxy may reach what we cannot
            return False
        with socket.create_connection((parts.hostname or "", port), timeout=_PROBE_S):
            return False
    except (OSError, ValueError):
        return True


def prepare_library() -> tuple[type[Exception], ...]:
    """Import MLflow with our defaults; returns the errors that mean 'not now'. Takes about two seconds."""
    for name, value in _CLIENT_DEFAULTS.items():
        os.environ.setdefault(name, value)
    import mlflow
    import sqlalchemy.exc

    for chatty in ("alembic", "mlflow.tracking.fluent"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # It logs a traceback for what the sender catches and reports in one line.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    # requests' errors are OSErrors.
    return (mlflow.MlflowException, sqlalchemy.exc.SQLAlchemyError, OSError)


def connect(uri: str | None = None) -> "MlflowClient":
    """A client of the store at `uri`, by default `tracking_uri()`; the store exists then."""
    from mlflow import MlflowClient

    uri = uri or tracking_uri()
    if not uri.startswith("sqlite:"):
        return MlflowClient(tracking_uri=uri)
    # Two processes that create the tables at once break each other's migration.
    with file_lock(Path(".slipstream/mlflow.lock")):
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
    return client


def first_line(error: Exception) -> str:
    """What an error says, in one line and without the password that an address may hold."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return re.sub(r"//[^/@\s]*@", "//", text)


def _read_services_uri() -> str | None:
    try:
        return SERVICES_URI.read_text(encoding="utf-8").strip() or None
    except FileNotFoundError:
        return None
