"""Real MLflow on SQLite."""

import contextlib
import fcntl
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest

from flows.servers import start_mlflow
from flows.worker import send_left_behind
from stages.common.config import Section
from stages.common.event_log import TRACKING, EventLog, read_sent, unsent_logs
from stages.common.pipeline_record import open_pipeline
from stages.common.process import free_port
from stages.common.tracking import Tracker, track_stage
from stages.common.tracking_client import SERVICES_URI, tracking_uri
from stages.common.tracking_sender import send_everything
from stages.common.tracking_start import describe_pipeline, describe_stage
from stages.common.tracking_urls import compare_url, find_pipeline_url
from stages.link_runs import link_runs

pytestmark = pytest.mark.filterwarnings(
    # MLflow 3.17 declares its own tables this way; SQLAlchemy 2.1 deprecates it.
    "ignore:The ``noload`` loader strategy is deprecated",
)

ROOT = Path(__file__).parents[2]
PARAMS = """
sft: {lr: 1e-4, epochs: 2}
rl: {algorithm: {name: remax}, kl_coef: 0.1}
tracking: {experiment: test, system_metrics: false}
"""
DVC_YAML = """
stages:
  train_sft: {cmd: x, params: [sft], outs: [artifacts/sft]}
  train_policy: {cmd: x, deps: [artifacts/sft], params: [rl], outs: [artifacts/policy]}
"""
DVC_LOCK = """
schema: '2.0'
stages:
  train_sft:
    cmd: x
    params: {params.yaml: {sft: {lr: 0.0001, epochs: 2}}}
    outs: [{path: artifacts/sft, md5: 0123456789abcdef0123456789abcdef.dir}]
"""
HASH = "0123456789abcdef0123456789abcdef.dir"


class SftConfig(Section):
    """Settings of the test."""

    lr: float = 1e-4
    warmup: int = 3


@pytest.fixture(autouse=True)
def project(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_store, tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in ("PIPELINE", "FLOW_RUN", "RECIPE"):
        monkeypatch.delenv(f"SLIPSTREAM_{name}", raising=False)
    Path("params.yaml").write_text(PARAMS)
    Path("dvc.yaml").write_text(DVC_YAML)
    Path("dvc.lock").write_text(DVC_LOCK)
    return tmp_path


def wait_until(is_true: Callable[[], bool]) -> None:
    for _ in range(600):
        if is_true():
            return
        threading.Event().wait(0.1)
    raise AssertionError("nothing happened in a minute")


def find_runs() -> dict[str, mlflow.entities.Run]:
    client = mlflow.MlflowClient(tracking_uri=tracking_uri())
    experiment = client.get_experiment_by_name("test")
    runs = client.search_runs([experiment.experiment_id])
    found = {run.data.tags.get("slipstream.stage", "pipeline"): run for run in runs}
    assert len(found) == len(runs)
    return found


def wait_for_run(tracker: Tracker) -> None:
    # A stage that is stopped gives its last events five seconds; on a busy machine the tables alone take longer.
    for _ in range(600):
        if tracker.run_id is not None:
            return
        threading.Event().wait(0.1)
    raise AssertionError("MLflow knows no run after 60 s")


def test_a_pipeline_is_one_run_with_its_stages_nested() -> None:
    with track_stage("train_sft", SftConfig()) as tracker:
        tracker.log_metrics({"learner/loss": 2.0, "learner/grad_norm": float("nan")}, step=1)
        tracker.log_metrics({"learner/loss": 1.5, "learner/grad_norm": float("inf")}, step=2)
        tracker.log_table("samples/first", [{"prompt": "a", "completion": "b"}, {"prompt": "c"}])
        tracker.log_summary({"sft/perplexity": 7.5})
    with track_stage("train_policy", None):
        pass
    with track_stage("judge_policy", None):
        pass

    runs = find_runs()
    parent = runs.pop("pipeline")
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.info.run_id}
    assert {run.info.status for run in [parent, *runs.values()]} == {"FINISHED"}
    assert parent.data.tags["stage.train_sft"] == runs["train_sft"].info.run_id
    assert parent.data.params["rl.algorithm.name"] == "remax"
    assert runs["train_sft"].data.params == {"sft.lr": "0.0001", "sft.epochs": "2", "sft.warmup": "3"}
    assert runs["train_sft"].data.metrics["learner/loss"] == 1.5
    assert runs["train_sft"].data.metrics["sft/perplexity"] == 7.5
    dataset = runs["train_policy"].inputs.dataset_inputs[0].dataset
    assert (dataset.name, dataset.digest) == ("artifacts/sft", "0123456789abcdef0123456789abcdef.dir")
    table = Path(runs["train_sft"].info.artifact_uri.removeprefix("file://")) / "samples/first.json"
    assert json.loads(table.read_text())["data"] == [["a", "b"], ["c", None]]


def test_a_resumed_stage_goes_on_in_its_run_and_a_finished_pipeline_is_not_continued(project: Path) -> None:
    resume_dir = project / "work"
    with (
        contextlib.suppress(KeyboardInterrupt),
        track_stage("train_sft", None, resume_dir=resume_dir) as tracker,
    ):
        tracker.log_metrics({"learner/loss": 2.0}, step=1)
        wait_for_run(tracker)
        raise KeyboardInterrupt
    wait_until(lambda: find_runs()["train_sft"].info.status == "KILLED")  # it has a few seconds, then goes on behind
    killed = find_runs()["train_sft"]
    assert (resume_dir / "mlflow_run_id").read_text() == killed.info.run_id

    with track_stage("train_sft", None, resume_dir=resume_dir) as tracker:
        tracker.log_metrics({"learner/loss": 1.0}, step=2)

    resumed = find_runs()["train_sft"]
    assert resumed.info.run_id == killed.info.run_id
    assert resumed.info.status == "FINISHED"
    history = mlflow.MlflowClient(tracking_uri=tracking_uri()).get_metric_history(resumed.info.run_id, "learner/loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 2.0), (2, 1.0)]
    assert find_runs()["pipeline"].info.status == "RUNNING"


def test_a_failed_stage_is_marked_and_changed_settings_open_another_pipeline() -> None:
    with pytest.raises(OSError, match="broken"), track_stage("train_sft", None):
        raise OSError("broken")
    assert {run.info.status for run in find_runs().values()} == {"FAILED"}

    Path("params.yaml").write_text(PARAMS.replace("0.1", "0.2"))
    with track_stage("train_policy", None):
        pass

    client = mlflow.MlflowClient(tracking_uri=tracking_uri())
    experiment = client.get_experiment_by_name("test")
    parents = client.search_runs([experiment.experiment_id], "tags.`slipstream.pipeline` LIKE '2%'")
    assert sorted(run.info.status for run in parents) == ["KILLED", "RUNNING"]


def test_events_of_an_outage_are_sent_by_the_next_stage(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    with track_stage("train_sft", None) as tracker:
        for step in range(200):
            tracker.log_metrics({"learner/loss": 1.0 / (step + 1)}, step=step)
        assert tracker.run_id is None
    assert caplog.text.count("MLflow is out of reach") == 1
    assert [path.stem for path in unsent_logs()] == ["train_sft"]

    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with track_stage("train_policy", None) as tracker:
        deadline = threading.Event()
        for _ in range(600):
            if not [path for path in unsent_logs() if path.stem == "train_sft"]:
                break
            deadline.wait(0.1)

    runs = find_runs()
    history = mlflow.MlflowClient(tracking_uri=tracking_uri()).get_metric_history(
        runs["train_sft"].info.run_id, "learner/loss"
    )
    assert len(history) == 200
    assert runs["train_sft"].info.status == "FINISHED"
    assert runs["train_policy"].data.tags["mlflow.parentRunId"] == runs["pipeline"].info.run_id


def test_the_projects_own_server_is_used_while_it_is_up_unless_another_is_named(
    monkeypatch: pytest.MonkeyPatch, project: Path
) -> None:
    SERVICES_URI.parent.mkdir(parents=True)
    SERVICES_URI.write_text("http://127.0.0.1:5000\n")
    assert tracking_uri() == "http://127.0.0.1:5000"

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5001")
    assert tracking_uri() == "http://127.0.0.1:5001"

    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    SERVICES_URI.unlink()
    assert tracking_uri() == f"sqlite:///{project}/mlflow.db"


def test_a_run_that_goes_on_in_another_store_is_there_from_its_beginning(project: Path) -> None:
    resume_dir = project / "work"
    SERVICES_URI.parent.mkdir(parents=True)
    SERVICES_URI.write_text("sqlite:///first.db")
    with (
        contextlib.suppress(KeyboardInterrupt),
        track_stage("train_sft", None, resume_dir=resume_dir) as tracker,
    ):
        tracker.log_metrics({"learner/loss": 2.0}, step=1)
        wait_for_run(tracker)
        raise KeyboardInterrupt

    SERVICES_URI.unlink()
    with track_stage("train_sft", None, resume_dir=resume_dir) as tracker:
        tracker.log_metrics({"learner/loss": 1.0}, step=2)

    run = find_runs()["train_sft"]
    history = mlflow.MlflowClient(tracking_uri=tracking_uri()).get_metric_history(run.info.run_id, "learner/loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 2.0), (2, 1.0)]


def test_events_that_are_sent_twice_are_kept_once(project: Path) -> None:
    with track_stage("train_sft", None) as tracker:
        tracker.log_metrics({"learner/loss": 1.0}, step=1)
    (log,) = project.glob(".slipstream/tracking/*/train_sft.jsonl")
    assert read_sent(log)["offset"] == log.stat().st_size

    log.with_suffix(".sent.json").unlink()  # as if killed before the offset was noted down
    with track_stage("train_policy", None):
        while unsent_logs() and log in unsent_logs():
            threading.Event().wait(0.1)

    run = find_runs()["train_sft"]
    history = mlflow.MlflowClient(tracking_uri=tracking_uri()).get_metric_history(run.info.run_id, "learner/loss")
    assert len(history) == 1


def test_stages_of_two_folders_share_the_pipeline_that_the_environment_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri())
    for name, value in {"PIPELINE": "nightly.7", "FLOW_RUN": "0a1b", "RECIPE": "none"}.items():
        monkeypatch.setenv(f"SLIPSTREAM_{name}", value)
    with pytest.raises(OSError, match="broken"), track_stage("train_sft", None):
        raise OSError("broken")
    assert find_runs()["pipeline"].info.status == "FAILED"
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.chdir(other)
    for name, text in (("params.yaml", PARAMS), ("dvc.yaml", DVC_YAML)):
        Path(name).write_text(text)

    with track_stage("train_policy", None):
        pass
    assert find_runs()["pipeline"].info.status == "RUNNING"
    with track_stage("judge_policy", None):
        pass

    runs = find_runs()
    parent = runs.pop("pipeline")
    assert parent.data.tags["slipstream.pipeline"] == "nightly.7"
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["dvc.lock.sha256"] == "none"  # the last stage ran where there is no dvc.lock
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.info.run_id}
    assert {run.data.tags["prefect.flow_run_id"] for run in [parent, *runs.values()]} == {"0a1b"}
    assert not any("slipstream.recipe" in run.data.tags for run in [parent, *runs.values()])


def test_a_side_stage_joins_the_run_that_is_over_and_opens_none() -> None:
    with track_stage("judge_policy", None):
        pass
    Path("params.yaml").write_text(PARAMS.replace("0.1", "0.2"))
    with track_stage("evaluate_checkpoints", None, is_side=True):
        pass

    runs = find_runs()
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert runs["pipeline"].data.tags["stage.evaluate_checkpoints"] == runs["evaluate_checkpoints"].info.run_id


def test_a_side_stage_ends_the_run_that_it_had_to_open() -> None:
    with track_stage("evaluate_checkpoints", None, is_side=True):
        pass

    assert {name: run.info.status for name, run in find_runs().items()} == {
        "pipeline": "FINISHED",
        "evaluate_checkpoints": "FINISHED",
    }


@pytest.mark.parametrize("params", [PARAMS, PARAMS.replace("0.1", "0.2")], ids=["the same", "other settings"])
def test_a_stage_that_was_killed_and_is_not_resumed_does_not_run_for_ever(params: str) -> None:
    """SIGKILL leaves its run as it is: only a start is in the log."""
    log = EventLog(TRACKING / open_pipeline().id / "train_sft.jsonl")
    described = describe_stage("train_sft", (), None) | {"is_side": False}
    log.append("start", **describe_pipeline(open_pipeline(), "test"), **described)
    log.close()
    assert send_everything(60)
    assert find_runs()["train_sft"].info.status == "RUNNING"
    Path("params.yaml").write_text(params)

    with track_stage("train_sft", None):
        pass

    client = mlflow.MlflowClient(tracking_uri=tracking_uri())
    experiment = client.get_experiment_by_name("test")
    runs = client.search_runs([experiment.experiment_id], "tags.`slipstream.stage` = 'train_sft'")
    assert sorted(run.info.status for run in runs) == ["FINISHED", "KILLED"]


def test_files_lie_beside_the_sqlite_file_of_a_clones_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri())
    clone = tmp_path / "clone"
    clone.mkdir()
    shutil.copy("params.yaml", clone)
    monkeypatch.chdir(clone)

    with track_stage("train_sft", None) as tracker:
        tracker.log_table("samples", [{"prompt": "a"}])

    assert find_runs()["train_sft"].info.artifact_uri.startswith((tmp_path / "mlruns").as_uri())
    assert not (clone / "mlruns").exists()


def test_a_worker_sends_what_a_run_in_a_clone_could_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tracking_uri()
    clone = tmp_path / ".slipstream/runs/key"
    clone.mkdir(parents=True)
    shutil.copy("params.yaml", clone)
    with contextlib.chdir(clone):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
        with track_stage("train_sft", None):
            pass
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("SLIPSTREAM_CHECKOUT", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    left = clone / TRACKING
    assert len(unsent_logs(left)) == 1

    with (clone.parent / "key.lock").open("a") as lock:  # the run goes on, and sends it itself
        fcntl.flock(lock, fcntl.LOCK_EX)
        send_left_behind()
        assert len(unsent_logs(left)) == 1
    send_left_behind()

    assert unsent_logs(left) == []
    assert find_runs()["train_sft"].info.status == "FINISHED"


def test_settings_that_are_too_long_are_cut_counted_and_kept_whole() -> None:
    text = "x" * 501
    Path("params.yaml").write_text(PARAMS.replace("epochs: 2", f"epochs: 2, note: {text}"))
    with track_stage("train_sft", SftConfig()):
        pass

    runs = find_runs()
    for run in (runs["pipeline"], runs["train_sft"]):
        assert run.data.params["sft.note"] == "x" * 482 + "… (501 characters)"  # 18 + 482 = 500
        assert run.data.params["sft.warmup"] == "3"
        assert run.data.tags["slipstream.shortened_params"] == "1"
        kept = Path(run.info.artifact_uri.removeprefix("file://")) / "params.json"
        assert json.loads(kept.read_text())["sft.note"] == text


def test_links_of_an_outage_are_caught_up_when_the_server_is_back(
    project: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    monkeypatch.setenv("SLIPSTREAM_PIPELINE", "nightly")
    Path("dvc.lock").unlink()
    with start_mlflow(project / "server", port) as server, track_stage("train_sft", None) as tracker:
        wait_until(lambda: tracker.run_id is not None)
        server.process.stop()
        tracker.log_metrics({"learner/loss": 1.0}, step=1)
    Path("dvc.lock").write_text(DVC_LOCK)  # as dvc does after the stage

    link_runs(["train_sft"])
    assert find_pipeline_url("nightly") is None
    assert "there is no link to the pipeline" in caplog.text

    with start_mlflow(project / "server", port):
        link_runs(["train_sft"])
        assert send_everything(60)
        assert unsent_logs() == []
        client = mlflow.MlflowClient(tracking_uri=url)
        runs = find_runs()
        (model,) = client.search_logged_models([runs["pipeline"].info.experiment_id])
        ids = [runs[name].info.run_id for name in ("pipeline", "train_sft")]
        address = find_pipeline_url("nightly")
        comparison = compare_url(ids)

    assert runs["train_sft"].info.status == "FINISHED"
    assert runs["train_sft"].data.metrics["learner/loss"] == 1.0
    assert runs["train_sft"].data.tags["dvc.out.artifacts/sft"] == HASH
    assert (model.name, model.tags["dvc.md5"], model.source_run_id) == ("sft", HASH, ids[1])
    experiment_id = runs["pipeline"].info.experiment_id
    assert address == f"{url}/#/experiments/{experiment_id}/runs/{ids[0]}?workflowType=machine_learning"
    assert comparison == (
        f"{url}/#/compare-runs?runs=%5B%22{ids[0]}%22%2C%22{ids[1]}%22%5D&experiments=%5B%22{experiment_id}%22%5D"
        "&workflowType=machine_learning"
    )


def test_a_store_without_pages_has_no_addresses() -> None:
    assert (find_pipeline_url("nightly"), compare_url(["0" * 32])) == (None, None)


def test_wrong_use_raises() -> None:
    with track_stage("train_sft", None) as tracker:
        with pytest.raises(ValueError, match="metric name"):
            tracker.log_metrics({"loss(nats)": 1.0}, step=0)
        with pytest.raises(ValueError, match="could not convert"):
            tracker.log_metrics({"loss": "high"}, step=0)  # type: ignore[dict-item]
        with pytest.raises(ValueError, match="artifact name"):
            tracker.log_table("../outside", [])
