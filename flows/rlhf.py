"""The whole pipeline as one Prefect flow: prompts and preferences in, a judged policy out.

Prefect decides when and where, DVC decides whether. A run works in a clone of its own (workspace.py). A stage is a
task here, or, where `placement` names a work pool, a run of deployment `stage/POOL` on one of that pool's workers.
"""

import contextlib

from prefect import State, flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.context import get_run_context
from prefect.states import Completed

from flows.children import run_child
from flows.clones import find_checkout
from flows.commands import has_dvc_remote
from flows.devices import hold_devices
from flows.dvc import allow_start
from flows.ending import ending_everything
from flows.execution import Order, bring_up_to_date, describe_outcome, describe_run, is_worth_retrying
from flows.generators import serve_generators
from flows.parameters import Placement, RunParameters, Stage, list_needed
from flows.summary import StageRow, finish_lineage, show_links, show_stages
from flows.workspace import (
    Workspace,
    adopt,
    choose_source,
    is_begun,
    name_run,
    open_workspace,
    prepare_settings,
)
from stages.common.errors import RunError

RETRY_DELAYS_S = [10.0, 60.0]
"""Before another attempt at a stage that failed for a reason that can heal."""
MAX_ATTEMPTS = 6
"""Of a whole run, after losses of its worker."""


@task(
    task_run_name="{stage}",
    retries=len(RETRY_DELAYS_S),
    retry_delay_seconds=RETRY_DELAYS_S,
    retry_condition_fn=is_worth_retrying,
    persist_result=False,
    cache_policy=NO_CACHE,
)
def run_stage(stage: Stage, workspace: Workspace, order: Order, rows: list[StageRow], *, hold: bool) -> State[None]:
    """Bring one stage up to date, here or on another worker; Prefect shows one that did not run as Cached.

    With `hold` the worker's devices are held for a stage that runs here; without, the run holds them already.
    """
    with StageRow.measure(stage, order.queue, rows) as row:
        if order.queue == "here":
            holding = hold_devices() if hold else contextlib.nullcontext()
            with holding, serve_generators(order, workspace) as env:
                row.outcome = describe_outcome(bring_up_to_date(stage, workspace, order, env))
        else:
            row.outcome = run_child(order)
            workspace.catch_up()
    return Completed(name=None if row.outcome == "run" else row.outcome.capitalize(), message=f"{stage}: {row.outcome}")


@flow(name="rlhf", log_prints=False, persist_result=False)
def rlhf(
    run: RunParameters = RunParameters(),  # noqa: B008  Prefect's page shows the default
    placement: Placement = Placement(),  # noqa: B008
) -> None:
    """Prompts and preferences in, a judged policy out.

    Args:
        run: what is run.
        placement: on which workers. A parameter of its own: who names one of `run` keeps a deployment's placement.
    """
    allow_start()
    require_hope()
    is_local, key = placement.is_local, run_key()
    # A worker of this machine may take up a stage, and holds the run's clone then.
    name = key if is_local else f"{key}.flow"
    repository, revision = choose_source(run.repository, run.revision, is_local=is_local, is_begun=is_begun(name))
    rows: list[StageRow] = []
    with ending_everything(), open_workspace(key, repository, revision, name=name) as workspace:
        prepare_settings(workspace, run.recipe, run.overrides)
        get_run_logger().info("run %s of commit %.10s in %s", workspace.key, revision, workspace.path)
        has_remote = has_dvc_remote(workspace.path)
        stages = list_needed(run, workspace.path / "dvc.yaml")
        # A run that waits for others must not hold a device that they may need: they could be of this very machine.
        is_all_here = all(placement.stages.get(stage, "here") == "here" for stage in stages)
        try:
            with hold_devices() if is_all_here else contextlib.nullcontext():
                for stage in stages:
                    order = Order.create(stage, run, placement, workspace, repository, has_remote=has_remote)
                    run_stage(stage, workspace, order, rows, hold=not is_all_here)
        finally:
            show_stages(rows)
        finish_lineage(workspace, describe_run(workspace.key, run.recipe))
        show_links(workspace)
        if is_local and repository == str(find_checkout().resolve()):
            give_to_checkout(workspace)
        workspace.finish()


def require_hope() -> None:
    """Give up a run whose process was lost again and again; the server would schedule it for ever.

    Raises:
        RunError: it is the attempt after the last.
    """
    flow_run = get_run_context().flow_run  # type: ignore[union-attr]
    assert flow_run is not None
    if flow_run.run_count > MAX_ATTEMPTS:
        raise RunError(f"this run was started {MAX_ATTEMPTS} times and lost each time; see its log and the worker's")


def run_key() -> str:
    """Names the run everywhere: its branch, its clone, its pipeline in MLflow. The same for a retry."""
    flow_run = get_run_context().flow_run  # type: ignore[union-attr]
    assert flow_run is not None
    return name_run(flow_run)


def give_to_checkout(workspace: Workspace) -> None:
    """Let the checkout have the run's results if it still is what the run ran; the run is done either way."""
    try:
        if adopt(workspace):
            get_run_logger().info("the checkout has this run's dvc.lock and artifacts")
    except RunError as error:
        get_run_logger().warning("the checkout has not all of this run's artifacts; `dvc checkout` there: %s", error)
