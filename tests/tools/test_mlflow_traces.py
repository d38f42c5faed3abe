"""Real MLflow: traces in a SQLite file, and at a server that goes away."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.store.tracking import rest_store

from flows.servers import start_mlflow
from stages.common import tracking_sender
from stages.common.event_log import read_sent, unsent_logs
from stages.common.process import free_port
from stages.common.traces import TraceRecord, describe_call, write_traces
from stages.common.tracking import Tracker, track_stage
from stages.common.tracking_client import connect, tracking_uri
from stages.common.tracking_sender import send_everything
from stages.common.tracking_traces import send_traces, trace_id
from stages.common.tracking_urls import WORKFLOW
from tests.tools.browser import find_chromium, start_browser

pytestmark = pytest.mark.filterwarnings(
    # MLflow 3.17 declares its own tables this way; SQLAlchemy 2.1 deprecates it.
    "ignore:The ``noload`` loader strategy is deprecated",
)

ROOT = Path(__file__).parents[2]
STARTED_AT = 1_700_000_000.5
ASKED = TraceRecord(
    key="k",
    name="judge_pairwise",
    started_at=STARTED_AT,
    latency_s=0.75,
    inputs={"messages": [{"role": "system", "content": "You judge."}, {"role": "user", "content": "Which is better?"}]},
    outputs={"messages": [{"role": "assistant", "content": "the first"}]},
    attributes={**describe_call("judge-7b", 412, 38, 0.002), "choice": "first", "reason": "it ends", "num_calls": 1},
    tags={"prompt_id": "p1", "order": "policy first"},
    is_error=False,
)


@pytest.fixture(autouse=True)
def project(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_store, tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "SLIPSTREAM_PIPELINE", "SLIPSTREAM_FLOW_RUN", "SLIPSTREAM_RECIPE"):
        monkeypatch.delenv(name, raising=False)
    Path("params.yaml").write_text("tracking: {experiment: test, system_metrics: false}\n")
    return tmp_path


def wait_until(is_true: Callable[[], bool]) -> None:
    for _ in range(600):
        if is_true():
            return
        threading.Event().wait(0.1)
    raise AssertionError("nothing happened in a minute")


def wait_for_run(tracker: Tracker) -> str:
    wait_until(lambda: tracker.run_id is not None)
    assert tracker.run_id is not None
    return tracker.run_id


def ask(number: int) -> list[TraceRecord]:
    return [replace(ASKED, key=f"k{index}", started_at=STARTED_AT + index) for index in range(number)]


def find_traces(run_id: str | None) -> list[mlflow.entities.Trace]:
    client = mlflow.MlflowClient(tracking_uri=tracking_uri())
    experiment = client.get_experiment_by_name("test").experiment_id
    traces: list[mlflow.entities.Trace] = []
    token = None
    while True:
        page = client.search_traces(
            locations=[experiment], run_id=run_id, max_results=500, page_token=token, include_spans=False
        )
        traces += page
        token = page.token
        if not token:
            return traces


def report(records: list[TraceRecord]) -> str:
    with track_stage("judge_policy", None) as tracker:
        tracker.log_traces("judge/verdicts", records)
    assert unsent_logs() == []
    assert tracker.run_id is not None
    return tracker.run_id


def test_a_call_is_a_trace_of_the_run_at_the_time_it_was_made() -> None:
    run_id = report([ASKED, replace(ASKED, key="unreadable", started_at=STARTED_AT + 60, is_error=True)])

    bad, good = find_traces(run_id)  # the newest first
    assert (good.info.trace_id, good.info.state, bad.info.state) == (trace_id(run_id, "k"), "OK", "ERROR")
    assert (good.info.request_time, good.info.execution_duration) == (1_700_000_000_500, 750)  # ms
    assert bad.info.request_time == 1_700_000_060_500
    assert good.info.token_usage == {"input_tokens": 412, "output_tokens": 38, "total_tokens": 450}
    assert json.loads(good.info.trace_metadata["mlflow.trace.cost"])["total_cost"] == 0.002
    assert (good.info.request_preview, good.info.response_preview) == ("Which is better?", "the first")
    shown = {name: good.info.tags[name] for name in ("mlflow.traceName", "prompt_id", "order")}
    assert shown == {"mlflow.traceName": "judge_pairwise", "prompt_id": "p1", "order": "policy first"}


def test_the_span_holds_what_was_asked_and_said() -> None:
    run_id = report([ASKED])

    trace = mlflow.MlflowClient(tracking_uri=tracking_uri()).get_trace(trace_id(run_id, "k"), display=False)
    (span,) = trace.data.spans
    assert (span.name, span.span_type, span.parent_id, span.model_name) == (
        "judge_pairwise",
        "CHAT_MODEL",
        None,
        "judge-7b",
    )
    assert (span.start_time_ns, span.end_time_ns) == (1_700_000_000_500_000_000, 1_700_000_001_250_000_000)
    assert (span.inputs, span.outputs) == (ASKED.inputs, ASKED.outputs)
    assert {name: span.attributes[name] for name in ASKED.attributes} == ASKED.attributes


def test_traces_of_two_runs_with_the_same_keys_are_different_traces() -> None:
    first, second = report(ask(2)), report(ask(2))

    assert (len(find_traces(first)), len(find_traces(second)), len(find_traces(None))) == (2, 2, 4)


def test_traces_that_are_sent_twice_are_kept_once(project: Path) -> None:
    run_id = report(ask(130))
    (log,) = project.glob(".slipstream/tracking/*/judge_policy.jsonl")

    log.with_suffix(".sent.json").unlink()  # as if killed before the offset was noted down
    assert send_everything(60.0)

    assert (len(find_traces(run_id)), len(find_traces(None))) == (130, 130)


def test_a_record_that_is_reported_again_is_the_same_trace() -> None:
    with track_stage("judge_policy", None) as tracker:
        tracker.log_traces("verdicts", ask(3))
        wait_until(lambda: unsent_logs() == [])
        tracker.log_traces("verdicts", [replace(ask(1)[0], attributes={"choice": "second"}), *ask(5)[1:]])

    assert len(find_traces(tracker.run_id)) == len(find_traces(None)) == 5
    client = mlflow.MlflowClient(tracking_uri=tracking_uri())
    changed = client.get_trace(trace_id(str(tracker.run_id), "k0"), display=False)
    assert changed.data.spans[0].attributes["choice"] == "second"


STAGE = """
import sys
from stages.common.tracking import track_stage
from stages.common.traces import read_traces
from pathlib import Path
records = list(read_traces(Path("records.jsonl"), 0, 10000))
with track_stage("judge_policy", None) as tracker:
    tracker.log_traces("verdicts", records)
"""


def test_a_kill_in_the_middle_of_sending_loses_and_doubles_nothing(project: Path) -> None:
    write_traces(project / "records.jsonl", ask(3000))
    command = [sys.executable, "-c", STAGE]
    stage = subprocess.Popen(command, cwd=project, env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        wait_until(lambda: num_sent_traces(project) >= 200)
    finally:
        stage.kill()
        stage.wait(60)
    num_sent = num_sent_traces(project)
    (log,) = unsent_logs()
    assert 200 <= num_sent < 3000

    assert send_everything(60.0)

    run_id = read_sent(log)["run_id"]
    assert (len(find_traces(run_id)), len(find_traces(None))) == (3000, 3000)


def num_sent_traces(project: Path) -> int:
    """How many are noted down as sent; an event holds a hundred."""
    for log in project.glob(".slipstream/tracking/*/judge_policy.jsonl"):
        return log.read_bytes()[: read_sent(log)["offset"]].count(b'"event": "traces"') * 100
    return 0


def test_traces_wait_while_the_server_is_away(
    project: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    with start_mlflow(project / "server", port) as server, track_stage("judge_policy", None) as tracker:
        tracker.log_traces("before", ask(3))
        run_id = wait_for_run(tracker)
        wait_until(lambda: unsent_logs() == [])
        server.process.stop()
        tracker.log_traces("after", [replace(record, key=f"after-{record.key}") for record in ask(230)])
    assert caplog.text.count("MLflow is out of reach") == 1
    assert len(unsent_logs()) == 1

    with start_mlflow(project / "server", port):
        assert send_everything(60.0)
        traces = find_traces(run_id)
        client = connect()
        status = client.get_run(run_id).info.status
        (span,) = (
            mlflow.MlflowClient(tracking_uri=tracking_uri())
            .get_trace(trace_id(run_id, "after-k0"), display=False)
            .data.spans
        )

    assert (len(traces), status) == (233, "FINISHED")
    assert (span.inputs, span.attributes["mlflow.llm.cost"]) == (ASKED.inputs, {"total_cost": 0.002})


def test_a_server_that_was_too_slow_once_to_say_its_version_gets_its_traces(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, asked = free_port(), []

    def too_slow_at_first(*arguments: Any, **more: Any) -> Any:
        if more["endpoint"] == "/version":
            asked.append(more)
            if len(asked) == 1:
                raise TimeoutError("no answer within 3 s")
        return http_request(*arguments, **more)

    http_request = rest_store.http_request
    monkeypatch.setattr(rest_store, "http_request", too_slow_at_first)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(tracking_sender, "_RETRY_EVERY_S", 1.0)
    rest_store.RestStore._get_server_version.cache_clear()
    with start_mlflow(project / "server", port), track_stage("judge_policy", None) as tracker:
        tracker.log_traces("asked", ask(3))
        run_id = wait_for_run(tracker)
        wait_until(lambda: unsent_logs() == [])
        assert len(find_traces(run_id)) == 3

    assert len(asked) >= 2


@pytest.mark.skipif(find_chromium() is None, reason="Chromium is not on this machine")
def test_the_runs_page_shows_its_traces_and_each_as_a_conversation(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    with start_mlflow(project / "server", port) as server:
        run_id = report([ASKED, replace(ASKED, key="unreadable", started_at=STARTED_AT + 60, is_error=True)])
        run = connect().get_run(run_id).info

        with start_browser(project) as browser, browser.open_page() as page:
            page.open(f"{server.url}/#/experiments/{run.experiment_id}/runs/{run_id}/traces?{WORKFLOW}")
            page.wait_for_texts("2 of 2", "Which is better?", "the first", "450", "0.75s", "OK", "Error")
            page.evaluate("document.querySelector('[data-component-id*=evaluation_id_link]').click()")
            page.wait_for_texts("judge_pairwise", "judge-7b", "You judge.", "Assistant")
            assert page.log.foreign == []


def test_what_no_database_takes_does_not_hold_up_the_rest() -> None:
    odd = replace(
        ASKED,
        key="odd/ключ\ud83d",
        name="n" * 9000,
        inputs={"messages": [{"role": "user", "content": "nul \0 half \ud83d emoji 😀"}]},
        tags={"what ever?": "t" * 9000, "half\ud83d": "half \ud83d"},
    )
    large = replace(ASKED, key="large", outputs={"messages": [{"role": "assistant", "content": "x" * 3_000_000}]})

    run_id = report([odd, large, *ask(3)])

    assert len(find_traces(run_id)) == 5
    client = mlflow.MlflowClient(tracking_uri=tracking_uri())
    assert client.get_run(run_id).info.status == "FINISHED"
    (span,) = client.get_trace(trace_id(run_id, odd.key), display=False).data.spans
    assert span.inputs["messages"][0]["content"] == "nul \ufffd half ? emoji 😀"


def test_a_file_that_is_gone_is_told_and_holds_up_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with track_stage("judge_policy", None) as tracker:
        run_id = wait_for_run(tracker)
        client = connect()
        event = {"event": "traces", "source": "gone.jsonl", "first": 0, "count": 100}
        send_traces(client, run_id, event)

    assert "traces are gone before they were sent path=gone.jsonl" in caplog.text


@contextmanager
def fake_server(version: str | None) -> Iterator[str]:
    """A server that knows one run, and names its version or does not."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_version = self.path == "/version"
            run = {"run": {"info": {"run_id": "r", "experiment_id": "1", "status": "RUNNING"}, "data": {}}}
            self.send_response(500 if is_version and version is None else 200)
            self.end_headers()
            self.wfile.write((version or "").encode() if is_version else json.dumps(run).encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()


def test_an_old_server_is_told_and_one_that_does_not_answer_is_asked_again(
    project: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_traces(project / "calls.jsonl", ask(1))
    event = {"event": "traces", "source": "calls.jsonl", "first": 0, "count": 100}

    with fake_server("3.3.0") as url:
        send_traces(connect(url), "r", event)
    assert "MLflow refuses traces, they stay in calls.jsonl" in caplog.text

    with fake_server(None) as url, pytest.raises(ConnectionError, match="version"):
        send_traces(connect(url), "r", event)


def test_wrong_names_raise() -> None:
    with track_stage("judge_policy", None) as tracker, pytest.raises(ValueError, match="artifact name"):
        tracker.log_traces("../outside", [])
