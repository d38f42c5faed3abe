"""Runs of MLflow as ours: found by our own ids or made, with their tags, settings and inputs."""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.common.event_log import Event, file_lock
from stages.common.tracking_client import REFUSALS, artifact_location
from stages.common.tracking_names import PARENT_TAG, PIPELINE_TAG, RUN_KEY_TAG, STAGE_TAG, safe_name, stage_tag

if TYPE_CHECKING:
    from mlflow import MlflowClient

MAX_PARAM = 500
"""Characters of a setting's value: what every MLflow server takes."""
_MAX_PARAMS_PER_CALL = 100
_MAX_DIGEST = 36
_NOTE = (
    "One run of the pipeline, with the settings of all stages and what the judge said. Curves, samples and files are "
    "at the child runs, one for each stage that ran. A tag `stage.NAME` names the run that made the stage's outs, also "
    "where that was an earlier pipeline's."
)
"""What MLflow's page says about a pipeline's run."""

logger = logging.getLogger(__name__)


def start_run(client: "MlflowClient", event: Event) -> str:
    """Find or make the stage's run under its parent, both running; returns its id."""
    parent_id, experiment_id = find_or_make_parent(client, event)
    if not event.get("is_side"):
        client.update_run(parent_id, status="RUNNING")
    shared = event.get("pipeline_tags", {})  # a log of version 0.1 has none
    tags = {**shared, **event["tags"]}
    run_id = find_run(client, [experiment_id], RUN_KEY_TAG, event["run_key"])
    if run_id is None:
        keys = {RUN_KEY_TAG: event["run_key"], PARENT_TAG: parent_id}
        run = client.create_run(experiment_id, start_time=event["time"], run_name=event["stage"], tags={**tags, **keys})
        run_id = str(run.info.run_id)
    else:
        client.update_run(run_id, status="RUNNING")
        set_tags(client, run_id, tags)
    _end_killed(client, experiment_id, parent_id, event, stage=event["stage"])
    send_params(client, run_id, event["params"])
    send_inputs(client, run_id, event["datasets"])
    set_tags(client, parent_id, {**shared, stage_tag(event["stage"]): run_id})
    send_params(client, parent_id, event["params"])
    resume_dir = event["resume_dir"]
    if resume_dir and Path(resume_dir).is_dir():
        (Path(resume_dir) / "mlflow_run_id").write_text(run_id, encoding="utf-8")
    return run_id


def find_or_make_parent(client: "MlflowClient", event: Event) -> tuple[str, str]:
    """Find or make the run of the whole pipeline; returns its id and its experiment's."""
    pipeline = event["pipeline"]
    experiment_id = _find_experiment(client, event["experiment"])
    superseded = pipeline["supersedes"]
    superseded_id = superseded and find_run(client, [experiment_id], PIPELINE_TAG, superseded)
    if superseded_id:
        client.set_terminated(superseded_id, "KILLED", end_time=event["time"])
        _end_killed(client, experiment_id, superseded_id, event)
    with file_lock(Path(".slipstream/parent.lock")):  # two first stages of this folder may start at once
        parent_id = find_run(client, [experiment_id], PIPELINE_TAG, pipeline["id"])
        return parent_id or _make_parent(client, experiment_id, event), experiment_id


def find_run(client: "MlflowClient", experiment_ids: list[str], tag: str, value: str) -> str | None:
    """The oldest run with this tag."""
    runs = client.search_runs(
        experiment_ids,
        filter_string=f"tags.`{tag}` = '{value}'",
        order_by=["attributes.start_time ASC", "attributes.run_id ASC"],
        max_results=1,
    )
    return str(runs[0].info.run_id) if runs else None


def set_tags(client: "MlflowClient", run_id: str, tags: dict[str, str]) -> None:
    """Set many tags in one call."""
    from mlflow.entities import RunTag

    client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])


def send_params(client: "MlflowClient", run_id: str, params: dict[str, Any]) -> None:
    """Add the settings that the run has not got; one that is too long is cut, counted, and kept whole in a file."""
    import mlflow
    from mlflow.entities import Param

    known = client.get_run(run_id).data.params
    texts = {safe_name(name): str(value) for name, value in params.items()}
    missing = {name: text for name, text in texts.items() if name not in known}
    entities = [Param(name, _shorten(text)) for name, text in missing.items()]
    for start in range(0, len(entities), _MAX_PARAMS_PER_CALL):
        try:
            client.log_batch(run_id, params=entities[start : start + _MAX_PARAMS_PER_CALL])
        except mlflow.MlflowException as error:
            if error.error_code not in REFUSALS:
                raise
            logger.warning("MLflow refuses settings, they stay in the local log: %s", error)
    num_cut = sum(len(text) > MAX_PARAM for text in texts.values()) + sum(name not in texts for name in params)
    if num_cut and missing:
        client.log_dict(run_id, params, "params.json")
        client.set_tag(run_id, "slipstream.shortened_params", str(num_cut))


def send_inputs(client: "MlflowClient", run_id: str, datasets: dict[str, str]) -> None:
    """Name the stage's inputs by path and DVC hash; nothing is loaded or copied."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = [
        DatasetInput(
            Dataset(path, digest[:_MAX_DIGEST], "dvc", json.dumps({"path": path, "md5": digest})),
            [InputTag("mlflow.data.context", "input")],
        )
        for path, digest in datasets.items()
    ]
    if inputs:
        client.log_inputs(run_id, inputs)


def _make_parent(client: "MlflowClient", experiment_id: str, event: Event) -> str:
    pipeline_id = event["pipeline"]["id"]
    shared = event.get("pipeline_tags", {})
    tags = {**shared, PIPELINE_TAG: pipeline_id, "mlflow.source.name": "dvc.yaml", "mlflow.note.content": _NOTE}
    run = client.create_run(experiment_id, start_time=event["time"], run_name=f"pipeline-{pipeline_id}", tags=tags)
    made_id = str(run.info.run_id)
    # Another machine may have made one at the same time; both then take the older.
    parent_id = find_run(client, [experiment_id], PIPELINE_TAG, pipeline_id) or made_id
    if parent_id != made_id:
        client.delete_run(made_id)
        return parent_id
    send_params(client, parent_id, event["pipeline_params"])
    return parent_id


def _end_killed(
    client: "MlflowClient", experiment_id: str, parent_id: str, event: Event, *, stage: str | None = None
) -> None:
    """End what still counts as running under a parent, of one stage or all, but for the event's own run.

    A stage that was killed tells nobody, and only an attempt that resumes it goes on in its run.
    """
    wanted = [f"tags.`{PARENT_TAG}` = '{parent_id}'", "attributes.status = 'RUNNING'"]
    wanted += [f"tags.`{STAGE_TAG}` = '{stage}'"] if stage is not None else []
    for run in client.search_runs([experiment_id], filter_string=" and ".join(wanted)):
        if run.data.tags.get(RUN_KEY_TAG) != event["run_key"]:
            client.set_terminated(run.info.run_id, "KILLED", end_time=event["time"])


def _find_experiment(client: "MlflowClient", name: str) -> str:
    import mlflow

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        location = artifact_location()
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except mlflow.MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)  # another stage was faster
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
    return str(experiment.experiment_id)


def _shorten(text: str) -> str:
    if len(text) <= MAX_PARAM:
        return text
    end = f"… ({len(text)} characters)"
    return text[: MAX_PARAM - len(end)] + end
