"""Flows on real workers of a real Prefect server; the pipeline is a toy with our stages' names."""

import json
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import psutil
import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import PrefectHTTPStatusError
from prefect.states import Scheduled

from flows.automations import make_automations
from flows.devices import LEASE_S
from flows.parameters import STAGES
from flows.workspace import name_run
from tests.tools.toy_project import Toy, toy_with_server, wait_for

pytestmark = pytest.mark.timeout(900)  # each wait has a limit of its own
RL = ["train_policy", "sample_policy", "judge_policy"]


# In one process, after its imports: the module's worker looks too, half a minute after the crash.
CRASH_AND_LOOK = """
import sys
from uuid import UUID
from prefect.client.orchestration import get_client
from prefect.states import Crashed
from flows.worker import look_for_missed
with get_client(sync_client=True) as api:
    api.set_flow_run_state(UUID(sys.argv[1]), Crashed(), force=True)
look_for_missed(3600)
sys.stderr.write("then\\n")
look_for_missed(0)
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Toy]:
    with toy_with_server(tmp_path_factory.mktemp("workers")) as toy, toy.worker("local", "control", "gpu"):
        yield toy


@pytest.fixture(autouse=True)
def forget_runs(toy: Toy) -> None:
    (toy.folder / "runs.log").unlink(missing_ok=True)
    for hold in toy.folder.glob("hold-*"):  # of a test that failed
        hold.unlink()


def client(toy: Toy) -> SyncPrefectClient:
    assert toy.server is not None
    return SyncPrefectClient(f"{toy.server.url}/api")


def start(toy: Toy, run: dict[str, Any], deployment: str = "rlhf/local", name: str = "run", **others: Any) -> UUID:
    with client(toy) as api:
        found = api.read_deployment_by_name(deployment)
        return api.create_flow_run_from_deployment(found.id, parameters={name: run, **others}).id


def read(toy: Toy, run_id: UUID) -> FlowRun:
    with client(toy) as api:
        return api.read_flow_run(run_id)


def wait_until_over(toy: Toy, run_id: UUID, timeout_s: float = 400) -> FlowRun:
    wait_for(lambda: (state := read(toy, run_id).state) and state.is_final(), timeout_s)
    return read(toy, run_id)


def task_states(toy: Toy, run_id: UUID) -> dict[str, str | None]:
    with client(toy) as api:
        tasks = api.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run_id])))
    return {task.name: task.state.name if task.state else None for task in tasks}


def artifacts(toy: Toy, run_id: UUID) -> dict[str, Any]:
    with client(toy) as api:
        found = api.read_artifacts(artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run_id])))
    return {str(item.key): item.data for item in found}


def message(run: FlowRun) -> str:
    assert run.state is not None
    return f"{run.state.name}: {run.state.message}"


def test_a_run_does_every_stage_once_and_leaves_the_checkout_with_nothing_to_do(toy: Toy) -> None:
    run_id = start(toy, {})

    assert message(wait_until_over(toy, run_id)) == "Completed: None"
    assert toy.runs() == list(STAGES)
    left = artifacts(toy, run_id)
    rows = json.loads(left["stages"])
    assert [(row["stage"], row["outcome"]) for row in rows] == [(stage, "run") for stage in STAGES]
    assert left["progress-train-policy"] == 100.0

    done = toy.run(sys.executable, "-m", "dvc", "repro")

    assert done.stdout.count("didn't change, skipping") == len(STAGES), done.stdout + done.stderr
    assert toy.runs() == list(STAGES)
    assert (toy.project / "artifacts/judge_policy/out.txt").read_text().splitlines()[-1].startswith("judge_policy")


def test_unchanged_stages_show_as_cached_or_restored_and_an_override_runs_what_depends_on_it(toy: Toy) -> None:
    wait_until_over(toy, start(toy, {}))
    before = toy.runs()
    run_id = start(toy, {"overrides": {"rl.seed": 1}})

    assert message(wait_until_over(toy, run_id)) == "Completed: None"
    assert toy.runs()[len(before) :] == RL
    states = task_states(toy, run_id)
    assert {stage for stage, state in states.items() if state == "Completed"} == set(RL)
    assert {state for stage, state in states.items() if stage not in RL} <= {"Cached", "Restored"}


def test_a_stage_that_is_placed_on_the_devices_of_its_own_run_gets_them(toy: Toy) -> None:
    """The toy has no DVC remote: what the other worker made comes out of the checkout's cache."""
    run = {"repository": str(toy.project), "stages": ["label_pairs"], "overrides": {"sft.seed": 7}}
    run_id = start(toy, run, placement={"stages": {"train_sft": "gpu"}})

    assert message(wait_until_over(toy, run_id)) == "Completed: None"
    assert toy.runs()[-2:] == ["train_sft", "label_pairs"]
    rows = {row["stage"]: row["worker"] for row in json.loads(artifacts(toy, run_id)["stages"])}
    assert (rows["train_sft"], rows["label_pairs"]) == ("gpu", "here")


def test_wrong_settings_end_a_run_before_any_stage_and_are_named(toy: Toy) -> None:
    ended = wait_until_over(toy, start(toy, {"overrides": {"rl.algorithm.name": "remx", "rl.num_updates": "many"}}))

    assert message(ended).startswith("Failed")
    assert "rl.algorithm.name='remx': allowed: 'online_dpo'" in message(ended)
    assert "rl.num_updates='many'" in message(ended)
    assert toy.runs() == []


@pytest.mark.parametrize(
    ("run", "field"),
    [({"stages": ["train_stf"]}, "train_stf"), ({"overrides": {"rll.seed": 1}}, "rll.seed"), ({"sed": 1}, "sed")],
)
def test_wrong_parameters_are_refused_by_the_server_and_no_run_is_made(
    toy: Toy, run: dict[str, Any], field: str
) -> None:
    with pytest.raises(PrefectHTTPStatusError, match=field) as caught:
        start(toy, run)

    assert caught.value.response.status_code == 409


def test_changes_that_are_not_committed_are_refused_by_name(toy: Toy) -> None:
    params = toy.project / "params.yaml"
    text = params.read_text()
    params.write_text(text + "\n")
    try:
        ended = wait_until_over(toy, start(toy, {}))
    finally:
        params.write_text(text)

    assert "the checkout has changes that are not committed: params.yaml" in message(ended)
    assert toy.runs() == []


def test_a_wrong_setting_found_by_a_stage_is_not_tried_again(toy: Toy) -> None:
    ended = wait_until_over(toy, start(toy, {"overrides": {"rl.seed": 666}}))

    assert "train_policy: rl.seed=666: this toy refuses it" in message(ended)
    assert Counter(toy.runs())["train_policy"] == 1


def test_cancelling_ends_the_stage_and_a_retry_goes_on_with_it(toy: Toy) -> None:
    hold = toy.hold("train_policy")
    (toy.folder / "pid-train_policy").unlink(missing_ok=True)
    run_id = start(toy, {"overrides": {"rl.seed": 2}})
    pid = toy.pid("train_policy")

    done = toy.run(sys.executable, "-m", "prefect", "flow-run", "cancel", str(run_id))
    assert done.returncode == 0, done.stderr
    assert message(wait_until_over(toy, run_id)).startswith("Cancelled")
    wait_for(lambda: not psutil.pid_exists(pid))

    hold.unlink()
    before = toy.runs()
    done = toy.run(sys.executable, "-m", "prefect", "flow-run", "retry", str(run_id))
    assert done.returncode == 0, done.stdout + done.stderr
    assert message(wait_until_over(toy, run_id)) == "Completed: None"
    assert toy.runs()[len(before) :] == RL


def test_a_run_whose_process_is_killed_is_scheduled_again_and_repeats_no_finished_stage(toy: Toy) -> None:
    hold = toy.hold("train_policy")
    (toy.folder / "pid-train_policy").unlink(missing_ok=True)
    run_id = start(toy, {"overrides": {"rl.seed": 3, "sft.seed": 3}})
    stage = psutil.Process(toy.pid("train_policy"))
    engine = next(parent for parent in stage.parents() if "prefect.engine" in parent.cmdline())

    engine.send_signal(signal.SIGKILL)
    wait_for(lambda: not stage.is_running() or stage.status() == psutil.STATUS_ZOMBIE)
    hold.unlink()

    # The server notices, the worker asks for work, the dead process's lease runs out, and half the stages run again.
    wait_for(lambda: (state := read(toy, run_id).state) and state.is_completed(), LEASE_S + 210)
    again = {"train_sft": 1, "label_pairs": 1, "train_reward": 1, "train_policy": 2, "sample_policy": 1}
    assert {stage: count for stage, count in Counter(toy.runs()).items() if stage in again} == again


def test_a_pipeline_that_the_server_left_crashed_is_scheduled_by_a_worker(toy: Toy) -> None:
    [again] = [each.name for each in make_automations() if each.name.endswith("scheduled again")]
    try:
        with client(toy) as api:
            for automation in api.read_automations_by_name(again):
                api.delete_automation(automation.id)
            found = api.read_deployment_by_name("rlhf/local")
            later = Scheduled(scheduled_time=datetime.now(UTC) + timedelta(days=1))
            run = api.create_flow_run_from_deployment(found.id, state=later)
        done = toy.run(sys.executable, "-c", CRASH_AND_LOOK, str(run.id))
        assert done.returncode == 0, done.stderr
        early, late = done.stderr.split("then\n")
        assert run.name not in early
        assert f"run {run.name} was still crashed" in late
        assert message(wait_until_over(toy, run.id)) == "Completed: None"
    finally:
        done = toy.run(sys.executable, "-c", "from flows import automations; automations.set_up_automations()")
        assert done.returncode == 0, done.stderr


def test_a_device_never_holds_two_runs(toy: Toy) -> None:
    hold = toy.hold("train_policy")
    (toy.folder / "pid-train_policy").unlink(missing_ok=True)
    with toy.worker("local"):  # of the same devices as the module's worker
        runs = [start(toy, {"overrides": {"rl.seed": seed}}) for seed in (4, 5)]
        toy.pid("train_policy")
        # Both have their clones and have come to the point where devices are taken.
        wait_for(lambda: all((toy.project / ".slipstream/runs" / name_run(read(toy, run))).exists() for run in runs))
        time.sleep(3)
        assert Counter(toy.runs())["train_policy"] == 1
        with client(toy) as api:
            assert {limit.active_slots for limit in api.read_global_concurrency_limits() if limit.active_slots} == {1}

        hold.unlink()
        assert [message(wait_until_over(toy, run)) for run in runs] == ["Completed: None"] * 2
    assert Counter(toy.runs())["train_policy"] == 2


def test_a_sweep_shares_what_its_points_have_in_common(toy: Toy) -> None:
    matrix = {"rl.algorithm.name": ["online_dpo", "remax"], "rl.max_staleness": [0, 1], "rl.seed": [10, 11]}
    run = {"overrides": {"sft.seed": 7, "data.seed": 7}}

    run_id = start(toy, {"matrix": matrix, "run": run}, "sweep/local", "sweep")

    assert message(wait_until_over(toy, run_id, 800)) == "Completed: None"
    counts = Counter(toy.runs())
    assert {stage: counts[stage] for stage in RL} == dict.fromkeys(RL, 8)
    assert (counts["train_sft"], counts["train_reward"]) == (1, 1)
    rows = json.loads(artifacts(toy, run_id)["sweep"])
    assert [row["rl.seed"] for row in rows] == [10, 11] * 4
    assert {row["state"] for row in rows} == {"Completed"}


def test_a_wrong_point_of_a_sweep_is_named_before_anything_runs(toy: Toy) -> None:
    run_id = start(toy, {"matrix": {"rl.seed": [0, "x"]}}, "sweep/local", "sweep")

    assert """point {"rl.seed": "x"}: rl.seed='x'""" in message(wait_until_over(toy, run_id))
    assert toy.runs() == []


def test_a_second_worker_leaves_the_automations_that_wait_for_a_lost_one_as_they_are(toy: Toy) -> None:
    def ids() -> list[UUID]:
        with client(toy) as api:
            return sorted(item.id for each in make_automations() for item in api.read_automations_by_name(each.name))

    before = ids()

    done = toy.run(sys.executable, "-c", "from flows import automations; automations.set_up_automations()")

    assert done.returncode == 0, done.stderr
    assert len(before) == 2
    assert ids() == before
