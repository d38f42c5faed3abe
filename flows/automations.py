"""What Prefect's server does by itself when a worker or its machine is lost, and what its workers do if it does not.

A run sends a heartbeat every `HEARTBEAT_S`. When none has come for `LOST_S`, the server calls it crashed, and
schedules a crashed pipeline again: it finds its clone and its checkpoints and goes on. Runs of single stages and of
generators are left to the run that waits for them.

An automation sees an event once. With SQLite the server may fail to handle it ("database is locked", four times in a
row) and then drops it, so every worker looks for pipelines that are still crashed (`schedule_missed`).
"""

from datetime import UTC, datetime, timedelta

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.responses import SetStateStatus
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import Automation, AutomationCore, EventTrigger, Posture
from prefect.states import AwaitingRetry

HEARTBEAT_S = 30
"""Prefect allows no less; its own default of 180 s would make every limit minutes longer."""
LOST_S = 120.0
RESTARTED = ("rlhf", "sweep")
"""Flows that are scheduled again."""
_SIGNS_OF_LIFE = (
    *("heartbeat", "Completed", "Cached", "Restored", "Failed", "Refused", "Cancelled", "Cancelling", "Crashed"),
    *("Suspended", "Paused", "AwaitingRetry", "Retrying", "Scheduled", "Pending"),
)


def make_automations() -> list[AutomationCore]:
    """Both of them, under names of their own."""
    lost = AutomationCore(
        name="slipstream: a run without heartbeat is crashed",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={f"prefect.flow-run.{name}" for name in _SIGNS_OF_LIFE},
            match={"prefect.resource.id": "prefect.flow-run.*"},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=LOST_S),
        ),
        actions=[
            ChangeFlowRunState(state=StateType.CRASHED, message=f"no heartbeat for {LOST_S:.0f} s: its worker is lost")
        ],
    )
    again = AutomationCore(
        name="slipstream: a crashed pipeline is scheduled again",
        trigger=EventTrigger(
            expect={"prefect.flow-run.Crashed"},
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related={
                "prefect.resource.role": "flow",
                "prefect.resource.name": list(RESTARTED),
            },
            for_each={"prefect.resource.id"},
            posture=Posture.Reactive,
            threshold=1,
            within=timedelta(seconds=0),
        ),
        actions=[ChangeFlowRunState(state=StateType.SCHEDULED, name="AwaitingRetry", message="scheduled again")],
    )
    return [lost, again]


def set_up_automations() -> None:
    """Make them on the server, in the place of others of the same name.

    One that is there as it should be stays: a new one would know nothing of the runs whose heartbeat is overdue, so the
    worker that is started after a loss would see to it that nobody notices.
    """
    with get_client(sync_client=True) as client:
        for automation in make_automations():
            is_there = False
            for earlier in client.read_automations_by_name(automation.name):
                if not is_there and _is_same(earlier, automation):
                    is_there = True
                else:
                    client.delete_automation(earlier.id)
            if not is_there:
                client.create_automation(automation)


def schedule_missed(missed_s: float) -> list[FlowRun]:
    """Schedule the pipelines again that have been crashed for `missed_s` seconds; those that the server let us."""
    crashed = FlowRunFilter(
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.CRASHED])),
        deployment_id=FlowRunFilterDeploymentId(is_null_=False),  # without one no worker could take it
    )
    with get_client(sync_client=True) as client:
        found = client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=list(RESTARTED))), flow_run_filter=crashed
        )
        latest = datetime.now(UTC) - timedelta(seconds=missed_s)
        missed = [run for run in found if run.state is not None and run.state.timestamp <= latest]
        again: State[None] = AwaitingRetry(message="scheduled again")
        return [run for run in missed if client.set_flow_run_state(run.id, again).status is SetStateStatus.ACCEPT]


def _is_same(earlier: Automation, automation: AutomationCore) -> bool:
    return AutomationCore.model_validate(earlier.model_dump(include=set(AutomationCore.model_fields))) == automation
