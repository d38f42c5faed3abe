"""A matrix of settings over shared upstream stages: what they have in common runs once, each point then on its own.

A point is a run of deployment `rlhf/local` (or another one) with a clone of its own. It takes the shared stages from
DVC's run cache. How many run at once is up to the workers: each takes one run, and a device holds one run.
"""

import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.client.schemas.objects import FlowRun
from pydantic import Field

from flows.children import start_child, wait_for_child
from flows.clones import find_checkout
from flows.commands import git
from flows.ending import ending_everything
from flows.parameters import ONLY_SETTINGS, Parameters, RunParameters, Setting, Stage, apply_settings, list_needed
from flows.rlhf import require_hope, run_key
from flows.summary import find_results
from flows.workspace import check_settings, choose_source, name_run
from stages.common.errors import RunError, SettingError
from stages.common.pipeline import read_stage
from stages.common.publish import read_json, write_json

MAX_POINTS = 256
LOCAL = "rlhf/local"
"""The deployment whose runs need nothing but the worker's checkout."""


class SweepParameters(Parameters):
    """Which settings to combine."""

    matrix: dict[Setting, list[Any]] = Field(min_length=1, json_schema_extra=ONLY_SETTINGS)
    """Values of each setting, such as {"rl.algorithm.name": ["online_dpo", "remax"], "rl.seed": [0, 1]}; every
    combination is a point."""
    run: RunParameters = RunParameters()
    """What all points have in common."""
    deployment: str = Field(default=LOCAL, pattern=r"^rlhf/[\w-]+$")
    """Which deployment runs a point."""


@flow(name="sweep", persist_result=False)
def sweep(sweep: SweepParameters) -> None:
    """Run every point of the matrix and lay them side by side.

    Raises:
        SettingError: a point's settings are wrong; nothing has run then.
        RunError: points failed; the others are compared all the same.
    """
    require_hope()
    points = list_points(sweep)
    pinned = sweep.run.model_copy(update=pin(sweep.run, sweep.deployment))
    shared = check_points(pinned, points)
    with ending_everything():
        if shared:
            get_run_logger().info("%s are the same for all %d points and run first", ", ".join(shared), len(points))
            run_shared(pinned, shared, sweep.deployment)
        children = [start_point(pinned, point, sweep.deployment) for point in points]
        finished = [wait_for_child(child.id) for child in children]
    compare(points, finished)


def pin(run: RunParameters, deployment: str) -> dict[str, str]:
    """Repository and commit of all points. A sweep that is started again keeps those that it had here at first.

    Raises:
        SettingError: see `choose_source`.
    """
    path = find_checkout() / ".slipstream" / "runs" / f"{run_key()}.sweep.json"
    if not path.exists():
        repository, revision = choose_source(run.repository, run.revision, is_local=deployment == LOCAL)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"repository": repository, "revision": revision})
    return {name: str(value) for name, value in read_json(path).items()}


def list_points(sweep: SweepParameters) -> list[dict[str, Any]]:
    """Every combination, the last setting changing fastest.

    Raises:
        SettingError: there are none, or more than `MAX_POINTS`.
    """
    points = [dict(zip(sweep.matrix, values, strict=True)) for values in itertools.product(*sweep.matrix.values())]
    if not 0 < len(points) <= MAX_POINTS:
        raise SettingError(f"matrix: {len(points)} points; expected 1 to {MAX_POINTS}")
    return points


def check_points(run: RunParameters, points: list[dict[str, Any]]) -> list[Stage]:
    """Check every point's settings; returns the stages that none of them touches.

    Raises:
        SettingError: naming the point and its settings.
    """
    assert run.repository is not None
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        git(Path(folder), "clone", "--quiet", "--no-checkout", run.repository, str(clone))
        git(clone, "checkout", "--quiet", "--detach", run.revision)
        for point in points:
            git(clone, "checkout", "--quiet", "--", "params.yaml")
            apply_settings(clone, run.recipe, run.overrides | point)
            try:
                check_settings(clone)
            except SettingError as error:
                raise SettingError(f"point {json.dumps(point)}: {error}") from error
        return list_shared(clone / "dvc.yaml", list_needed(run, clone / "dvc.yaml"), list(points[0]))


def list_shared(dvc_yaml: Path, stages: list[Stage], settings: list[str]) -> list[Stage]:
    """The stages before the first one that one of these settings belongs to."""
    for index, stage in enumerate(stages):
        keys = [key for _, key in read_stage(stage, dvc_yaml).params if key is not None]
        if any(_overlap(key, setting) for key in keys for setting in settings):
            return stages[:index]
    return list(stages)


def run_shared(run: RunParameters, stages: list[Stage], deployment: str) -> None:
    """Bring what all points share up to date, once.

    Raises:
        RunError: it failed.
    """
    parameters = run.model_copy(update={"stages": stages})
    child = start_child(deployment, _dump(parameters), f"{run_key()}-shared", name="shared")
    state = wait_for_child(child.id).state
    if state is None or not state.is_completed():
        raise RunError(f"the stages that all points share: {state.message if state else 'no state'}")


def start_point(run: RunParameters, point: dict[str, Any], deployment: str) -> FlowRun:
    """Start the run of one point."""
    name = describe_point(point)
    parameters = run.model_copy(update={"overrides": run.overrides | point})
    return start_child(deployment, _dump(parameters), f"{run_key()}-{name}", name=name)


def compare(points: list[dict[str, Any]], finished: list[FlowRun]) -> None:
    """A table of all points with their numbers, and a link to MLflow's compare page.

    Raises:
        RunError: some points failed.
    """
    results, url = find_results([name_run(child) for child in finished])
    rows = [
        point | {"state": child.state.name if child.state else "unknown"} | results.get(name_run(child), {})
        for point, child in zip(points, finished, strict=True)
    ]
    create_table_artifact(rows, key="sweep", description="Every point of the matrix, and what its judge said")
    if url is not None:
        create_markdown_artifact(f"[All points side by side in MLflow]({url})", key="sweep-comparison")
    failed = [describe_point(row) for row, child in zip(points, finished, strict=True) if not _is_completed(child)]
    if failed:
        raise RunError(f"{len(failed)} of {len(points)} points failed: {', '.join(failed)}")


def describe_point(point: dict[str, Any]) -> str:
    """`algorithm.name=remax seed=1` as a name of a run."""
    return " ".join(f"{name.partition('.')[2]}={json.dumps(value).strip(chr(34))}" for name, value in point.items())


def _is_completed(child: FlowRun) -> bool:
    return child.state is not None and child.state.is_completed()


def _overlap(key: str, setting: str) -> bool:
    return f"{setting}.".startswith(f"{key}.") or f"{key}.".startswith(f"{setting}.")


def _dump(parameters: RunParameters) -> dict[str, Any]:
    return {"run": parameters.model_dump(mode="json")}
