"""One stage on one worker: in the run's clone, its output in Prefect's log, its results pushed."""

import contextlib
from typing import Any, Literal

from prefect.client.schemas.objects import State, TaskRun

from flows.commands import run_dvc
from flows.dvc import Reproduction, reproduce
from flows.output import StageOutput
from flows.parameters import Parameters, Placement, Queue, RunParameters, Stage
from flows.workspace import Workspace
from stages.common.errors import InputError, SettingError

Outcome = Literal["run", "cached", "restored"]
"""Of a stage: it ran, nothing had changed, or DVC's run cache had its outs."""


class Order(Parameters):
    """One stage of one run, as a worker is told of it."""

    key: str
    """Of the run."""
    stage: Stage
    queue: Queue
    repository: str
    revision: str
    """Commit that the run started from."""
    variables: dict[str, str]
    """For the stage's environment: which pipeline it belongs to."""
    has_remote: bool
    """Whether DVC has a remote, through which artifacts travel."""
    placement: Placement

    @classmethod
    def create(
        cls,
        stage: Stage,
        run: RunParameters,
        placement: Placement,
        workspace: Workspace,
        repository: str,
        *,
        has_remote: bool,
    ) -> "Order":
        """The order of one stage of a run."""
        return cls(
            key=workspace.key,
            stage=stage,
            queue=placement.stages.get(stage, "here"),
            repository=repository,
            revision=workspace.commit,
            variables=describe_run(workspace.key, run.recipe),
            has_remote=has_remote,
            placement=placement,
        )


def describe_run(key: str, recipe: str | None) -> dict[str, str]:
    """What MLflow's runs are tagged with."""
    from prefect.runtime import flow_run

    variables = {"SLIPSTREAM_PIPELINE": key, "SLIPSTREAM_FLOW_RUN": str(flow_run.id)}
    return variables if recipe is None else variables | {"SLIPSTREAM_RECIPE": recipe}


def bring_up_to_date(
    stage: Stage, workspace: Workspace, order: Order, env: dict[str, str] | None = None
) -> Reproduction:
    """Run the stage in the clone if DVC says so, then push its outs and its entry of dvc.lock.

    Args:
        stage: of dvc.yaml.
        workspace: the run's clone.
        order: what the run wants.
        env: for the stage, beside the order's own variables.

    Raises:
        SettingError, RunError: see `reproduce`.
    """
    if not order.has_remote and not order.placement.is_local:
        # What other workers of this machine have made is in the cache that all clones share.
        run_dvc(workspace.path, "checkout", "--allow-missing", "--force")
    workspace.restore_inputs(pull=order.has_remote)
    log_path = workspace.path / ".slipstream" / "logs" / f"{stage}.log"
    variables = order.variables | (env or {})
    with StageOutput(stage, log_path) as output, contextlib.chdir(workspace.path):
        result = reproduce(stage, pull=order.has_remote, env=variables, echo=output.take)
    if order.has_remote:
        # A stage that was skipped may have been run by someone who did not push.
        run_dvc(workspace.path, "push", "--run-cache", stage)
    workspace.save(f"run {workspace.key}: {stage}")
    return result


def describe_outcome(result: Reproduction) -> Outcome:
    """What became of the one stage that was asked for."""
    if result.ran:
        return "run"
    return "restored" if result.restored else "cached"


def is_worth_retrying(task: Any, task_run: TaskRun, state: State[Any]) -> bool:  # noqa: ARG001  Prefect's signature
    """Whether another attempt may succeed: not where a setting or a file is wrong."""
    return not isinstance(state.data, SettingError | InputError)
