"""The model registry and what it needs to know of a run, on real MLflow with SQLite."""

import json
import shutil
from pathlib import Path

import mlflow
import pytest

from stages.common.errors import RunError, SettingError
from stages.common.judged_run import JudgedRun, find_judged_run
from stages.common.pipeline_record import RECORD
from stages.common.process import free_port
from stages.common.registry import find_champion, register_champion
from stages.common.tracking import track_stage
from stages.common.tracking_client import tracking_uri

pytestmark = pytest.mark.filterwarnings(
    # MLflow 3.17 declares its own tables this way; SQLAlchemy 2.1 deprecates it.
    "ignore:The ``noload`` loader strategy is deprecated",
)

FIRST = "0123456789abcdef0123456789abcde1.dir"
SECOND = "0123456789abcdef0123456789abcde2.dir"
DVC_YAML = """
stages:
  train_policy: {cmd: x, outs: [artifacts/policy]}
  sample_policy: {cmd: x, deps: [artifacts/policy]}
  judge_policy: {cmd: x}
"""


@pytest.fixture(autouse=True)
def project(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    Path("params.yaml").write_text("tracking: {experiment: test, system_metrics: false}")
    Path("dvc.yaml").write_text(DVC_YAML)
    return tmp_path


def track(md5: str, *stages: str) -> None:
    Path("dvc.lock").write_text(
        f"schema: '2.0'\nstages: {{train_policy: {{cmd: x, outs: [{{path: artifacts/policy, md5: {md5}}}]}}}}\n"
    )
    for stage in stages:
        with track_stage(stage, None) as tracker:
            tracker.log_summary({"judge/kl_nats": 3.0, "learner/loss": 1.0})


def track_all(md5: str) -> JudgedRun:
    track(md5, "train_policy", "sample_policy", "judge_policy")
    return find_judged_run("latest", "test")


def connect() -> mlflow.MlflowClient:
    return mlflow.MlflowClient(tracking_uri=tracking_uri())


def test_the_judged_policy_and_its_numbers_are_found_by_either_id() -> None:
    judged = track_all(FIRST)

    assert judged.policy_md5 == FIRST
    assert judged.metrics == {"kl_nats": 3.0}
    assert find_judged_run(judged.run_id, "test") == judged
    assert find_judged_run(judged.pipeline, "test") == judged


def test_an_earlier_policy_that_is_promoted_again_gets_the_alias_back_and_no_second_version() -> None:
    assert find_champion() is None
    first, second = track_all(FIRST), track_all(SECOND)

    champions = [register_champion(judged, {"promotion.verdict": "pass"}) for judged in (first, first, second, first)]

    assert [(item.version, item.replaces) for item in champions] == [("1", None), ("1", None), ("2", "1"), ("1", "2")]
    assert find_champion() == "1"
    assert len(connect().search_model_versions("name = 'slipstream-policy'")) == 2


def test_a_logged_model_of_the_same_weights_is_what_is_registered() -> None:
    judged = track_all(FIRST)
    client, training = connect(), judged.stage_runs["train_policy"]
    models = [
        client.create_logged_model(judged.experiment_id, "policy", source_run_id=training, tags={"dvc.md5": md5})
        for md5 in (FIRST, SECOND)
    ]

    register_champion(judged, {})

    champion = client.get_model_version_by_alias("slipstream-policy", "champion")
    assert champion.source == f"models:/{models[0].model_id}"


def test_a_run_that_was_not_judged_is_refused() -> None:
    track(FIRST, "train_policy", "sample_policy")
    pipeline = json.loads(RECORD.read_text())["id"]

    with pytest.raises(RunError, match=r"^run \w{32} has no run of stage judge_policy, so it cannot be promoted$"):
        find_judged_run(pipeline, "test")
    with pytest.raises(SettingError, match=r"has no finished, judged pipeline run$"):
        find_judged_run("latest", "test")


def test_a_run_whose_judge_failed_is_refused() -> None:
    judged = track_all(FIRST)
    connect().set_terminated(judged.stage_runs["judge_policy"], "FAILED")

    with pytest.raises(RunError, match=rf"^stage judge_policy of run {judged.run_id} is FAILED, not FINISHED$"):
        find_judged_run("latest", "test")


def test_a_policy_that_is_not_the_one_that_was_judged_is_refused() -> None:
    judged = track_all(FIRST)
    connect().set_tag(judged.stage_runs["train_policy"], "dvc.out.artifacts/policy", SECOND)

    with pytest.raises(RunError, match=rf"^artifacts/policy was trained as {SECOND}, but {FIRST} was sampled and judg"):
        find_judged_run("latest", "test")


@pytest.mark.parametrize("run", ["0" * 32, "a' OR '1'='1", "nobody"])
def test_an_unknown_run_is_named(run: str) -> None:
    track_all(FIRST)

    with pytest.raises(SettingError) as caught:
        find_judged_run(run, "test")

    where = f"experiment 'test' of MLflow at {tracking_uri()}"
    assert str(caught.value) == f"run={run}: {where} has no pipeline run {run!r}"


def test_a_server_out_of_reach_is_one_line_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://person:secret@{address}")

    with pytest.raises(RunError) as caught:
        find_judged_run("latest", "test")

    message = str(caught.value)
    assert message.startswith(f"MLflow at http://{address}: ")
    assert "secret" not in message
    assert "\n" not in message
