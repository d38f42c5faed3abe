"""The MLflow side of traces.py: every recorded call becomes a trace that is linked to the stage's run.

MLflow's own tracing is not used: its exporter sends in the background, logs what fails and forgets it. Here a batch
is one request for the spans and one for the links, and an outage is raised to the sender, which comes back. A trace's
id follows from the run and the record's key, and the store replaces a span that it has, so sending twice changes
nothing.
"""

import base64
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stages.common.event_log import Event
from stages.common.traces import Json, TraceRecord, read_traces
from stages.common.tracking_client import REFUSALS
from stages.common.tracking_names import MAX_NAME, safe_name

if TYPE_CHECKING:
    from mlflow import MlflowClient, MlflowException
    from mlflow.entities import Span

_MAX_BATCH_BYTES = 500_000
"""Of texts in one request: some proxies take no more than 1 MB. A larger record goes alone."""
_TAG_PREFIX = "mlflow.traceTag."
_UNSUPPORTED = ("is less than 3.4", "span logging is not supported")
"""What MLflow says where the server, or the store behind it, takes no spans: for good, unlike its other errors."""

logger = logging.getLogger(__name__)


def send_traces(client: "MlflowClient", run_id: str, event: Event) -> None:
    """Send the records that one event announces.

    Raises:
        ConnectionError: the server is out of reach, or cannot take them now.
        SQLAlchemyError: the same, of a store without a server.
    """
    import mlflow
    from mlflow.store.tracking.rest_store import RestStore

    source = Path(event["source"])
    if not source.exists():
        logger.warning("traces are gone before they were sent path=%s", source)
        return
    try:
        experiment_id = str(client.get_run(run_id).info.experiment_id)
        for batch in _split(read_traces(source, event["first"], event["count"])):
            _send_batch(client, experiment_id, run_id, batch)
    except (mlflow.MlflowException, NotImplementedError) as error:
        if not _is_final(error):
            # Before it sends spans, MLflow asks for the server's version; no answer is a NotImplementedError too, and
            # would be remembered for the rest of this process.
            RestStore._get_server_version.cache_clear()
            raise ConnectionError(str(error)) from error
        logger.warning("MLflow refuses traces, they stay in %s: %s", source, error)


def trace_id(run_id: str, key: str) -> str:
    """MLflow's id of the trace of one record."""
    return f"tr-{_hash(run_id, key).hex()}"


def _send_batch(client: "MlflowClient", experiment_id: str, run_id: str, records: list[TraceRecord]) -> None:
    from mlflow.tracing.client import TracingClient

    spans = [_to_span(run_id, record) for record in records]
    TracingClient(client.tracking_uri).log_spans(experiment_id, spans)
    client.link_traces_to_run([trace_id(run_id, record.key) for record in records], run_id)


def _to_span(run_id: str, record: TraceRecord) -> "Span":
    """The one span of a trace; what the trace itself shows, the store takes from it."""
    from mlflow.entities import Span, SpanType

    digest = _hash(run_id, record.key)
    start_ns = int(record.started_at * 1e9)
    attributes: dict[str, Json] = {
        **record.attributes,
        "mlflow.traceRequestId": trace_id(run_id, record.key),
        "mlflow.spanType": SpanType.CHAT_MODEL,
        "mlflow.spanInputs": record.inputs,
        "mlflow.spanOutputs": record.outputs,
        f"{_TAG_PREFIX}mlflow.traceName": record.name[:MAX_NAME],
        **{_TAG_PREFIX + safe_name(_clean_text(name)): value for name, value in record.tags.items()},
    }
    return Span.from_dict(
        {
            "trace_id": base64.b64encode(digest).decode(),
            "span_id": base64.b64encode(digest[:8]).decode(),
            "parent_span_id": None,
            "name": _clean_text(record.name[:MAX_NAME]),
            "start_time_unix_nano": start_ns,
            "end_time_unix_nano": start_ns + int(record.latency_s * 1e9),
            "status": {"code": f"STATUS_CODE_{'ERROR' if record.is_error else 'OK'}", "message": ""},
            "attributes": {_clean_text(name): json.dumps(_clean(value)) for name, value in attributes.items()},
        }
    )


def _split(records: Iterable[TraceRecord]) -> Iterator[list[TraceRecord]]:
    """Batches of at most `_MAX_BATCH_BYTES`."""
    batch: list[TraceRecord] = []
    num_bytes = 0
    for record in records:
        size = sum(len(json.dumps(part)) for part in (record.inputs, record.outputs, record.attributes, record.tags))
        if batch and num_bytes + size > _MAX_BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
        batch.append(record)
        num_bytes += size
    if batch:
        yield batch


def _clean(value: Json) -> Json:
    """The same with `_clean_text` for every text in it."""
    if isinstance(value, str):
        return _clean_text(value)
    if isinstance(value, Mapping):
        return {_clean_text(name): _clean(item) for name, item in value.items()}
    return [_clean(item) for item in value] if isinstance(value, Sequence) else value


def _clean_text(text: str) -> str:
    """The same without what a database cannot hold: NUL, and halves of surrogate pairs."""
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode()


def _hash(run_id: str, key: str) -> bytes:
    return hashlib.sha256(f"{run_id}/{key}".encode("utf-8", "surrogatepass")).digest()[:16]


def _is_final(error: "MlflowException | NotImplementedError") -> bool:
    """Whether sending again would not change the answer."""
    return getattr(error, "error_code", None) in REFUSALS or any(text in str(error) for text in _UNSUPPORTED)
