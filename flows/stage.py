"""One stage as a deployment of its own: what a worker of pool `cpu` or `gpu` runs for a pipeline elsewhere."""

from prefect import State, flow
from prefect.states import Completed, Failed

from flows.children import REFUSED
from flows.devices import hold_devices
from flows.dvc import allow_start
from flows.ending import ending_everything
from flows.execution import Order, Outcome, bring_up_to_date, describe_outcome
from flows.generators import serve_generators
from flows.summary import finish_lineage
from flows.workspace import open_workspace
from stages.common.errors import InputError, SettingError


@flow(name="stage", persist_result=False)
def stage(order: Order) -> State[None]:
    """Bring one stage of a run up to date in this worker's clone of it, and push what it made."""
    allow_start()
    try:
        outcome = run_order(order)
    except (SettingError, InputError) as error:
        return Failed(name=REFUSED, message=str(error))
    return Completed(name=None if outcome == "run" else outcome.capitalize())


def run_order(order: Order) -> Outcome:
    """Do what an order says, with generators on other workers if it wants any."""
    with ending_everything(), open_workspace(order.key, order.repository, order.revision) as workspace:
        with hold_devices(), serve_generators(order, workspace) as env:
            outcome = describe_outcome(bring_up_to_date(order.stage, workspace, order, env))
        finish_lineage(workspace, order.variables, order.stage)
        workspace.finish()
        return outcome
