"""Two workers that share nothing but a git repository, a DVC remote, Prefect's server and MLflow's, on a tiny model.

The learner and vLLM's generator run on different workers, and the generator is lost in the middle.
"""

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest
from prefect.client.schemas.filters import FlowFilter, FlowFilterName

from flows.servers import start_mlflow, start_prefect
from flows.workspace import name_run
from stages.common.process import free_port
from stages.rl.ledger.checks.run import check_ledger
from stages.rl.ledger.reader import read_ledger
from tests.integration.conftest import TOY_SETTINGS, Project
from tests.tiny import save_tiny_model
from tests.tools.test_workers import artifacts, client, message, read, start, task_states
from tests.tools.toy_project import Toy, wait_for

ROOT = Path(__file__).parents[2]
SETTINGS: dict[str, Any] = TOY_SETTINGS | {
    "model.source": {"kind": "path", "path": "inputs/model/tiny"},
    "generation.engine": "vllm",
    "generation.kv_cache_gib": 1,
    "generation.cpu_cores": "0-1",
    "rl.num_updates": 12,
    "rl.eval_every": 6,
    "rl.max_staleness": 1,
    "rl.keep_checkpoints": "all",
    "rl.generator.heartbeat_timeout_s": 10.0,
}
GPU_STAGES = ["train_sft", "label_pairs", "train_reward", "train_policy", "sample_policy"]
PLACEMENT: dict[str, Any] = {
    "stages": {"prepare_model": "cpu", "prepare_data": "cpu", "judge_policy": "cpu", **dict.fromkeys(GPU_STAGES, "gpu")}
}


@pytest.mark.timeout(2700)
def test_two_workers_complete_the_pipeline_and_replace_a_lost_generator(tmp_path: Path) -> None:
    with make_site(tmp_path) as (near, far):
        with near.worker("control", "cpu", "generator", "local", devices="cpu:0"), far.worker("gpu", devices="cpu:1"):
            placement = PLACEMENT | {"generators": 1, "weights_dir": str(tmp_path / "weights")}
            run_id = start(near, placement, "rlhf/distributed", "placement")
            kill_the_generator_when_training(far, name_run(read(near, run_id)))
            wait_for(lambda: (state := read(near, run_id).state) and state.is_final(), 900)
            assert message(read(near, run_id)) == "Completed: None"
            assert set(task_states(near, run_id).values()) == {"Completed"}

            key = name_run(read(near, run_id))
            judged = start(near, {"run": key, "repository": str(tmp_path / "git")}, "evaluate/local", "evaluation")
            wait_for(lambda: (state := read(near, judged).state) and state.is_final(), 300)
            assert message(read(near, judged)) == "Completed: None"
            table = artifacts(near, judged)["checkpoints"].splitlines()
            assert [line.split(" | ")[0] for line in table[2:]] == ["| 6", "| 12"]

            # Placed by the deployment itself, which naming a parameter of `run` leaves as it is.
            num_elsewhere = count_stage_runs(near)
            again = start(near, {"stages": ["train_policy"]}, "rlhf/distributed")
            wait_for(lambda: (state := read(near, again).state) and state.is_final(), 200)
            assert set(task_states(near, again).values()) <= {"Cached", "Restored"}
            assert count_stage_runs(near) == num_elsewhere + 6
        assert_a_fresh_clone_has_nothing_to_do(tmp_path, key)
        assert_one_parent_holds_all_stages(near, key)


def count_stage_runs(near: Toy) -> int:
    """Stages that the workers of pools cpu and gpu were given."""
    with client(near) as api:
        return len(api.read_flow_runs(flow_filter=FlowFilter(name=FlowFilterName(any_=["stage"]))))


def kill_the_generator_when_training(far: Toy, key: str) -> None:
    """SIGKILL of vLLM and all around it, but not of its flow run, after the second update."""
    log = far.project / ".slipstream/runs" / key / ".slipstream/logs/train_policy.log"
    wait_for(lambda: log.exists() and "update=2/" in log.read_text(), 800)
    servers = [item for item in psutil.process_iter(["cmdline"]) if "stages.serve" in (item.info["cmdline"] or [])]
    ours = [item for item in servers if key in str(Path(f"/proc/{item.pid}/cwd").resolve())]
    assert ours
    for server in ours:
        server.send_signal(signal.SIGKILL)


def assert_a_fresh_clone_has_nothing_to_do(tmp_path: Path, key: str) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", "-b", f"runs/{key}", tmp_path / "git", clone], check=True, timeout=60)
    fresh = Toy(tmp_path / "fresh-clone")
    fresh.folder.mkdir()
    clone.rename(fresh.project)
    add_remote(fresh, tmp_path)
    for command in (["pull", "--run-cache"], ["repro"]):
        done = fresh.run(sys.executable, "-m", "dvc", *command, timeout_s=300)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "Running stage" not in done.stdout
    ledger = fresh.project / "artifacts/ledger"
    assert [line for check in check_ledger(ledger) for line in check.violations] == []
    assert [update.update for update in read_ledger(ledger).updates()] == list(range(12))


def assert_one_parent_holds_all_stages(near: Toy, key: str) -> None:
    client = mlflow.MlflowClient(tracking_uri=near.extra["MLFLOW_TRACKING_URI"])
    experiments = [item.experiment_id for item in client.search_experiments()]
    parents = client.search_runs(experiments, f"tags.`slipstream.pipeline` = '{key}'")
    roots = [run for run in parents if "mlflow.parentRunId" not in run.data.tags]
    assert len(roots) == 1
    children = client.search_runs(experiments, f"tags.`mlflow.parentRunId` = '{roots[0].info.run_id}'")
    assert roots[0].info.status == "FINISHED"
    # Each of the stages that ran anywhere is linked to what it made, also the last one on its worker.
    linked = [run for run in children if any(name.startswith("dvc.out.") for name in run.data.tags)]
    assert {run.data.tags["slipstream.stage"] for run in linked} >= {
        *("prepare_model", "train_policy", "sample_policy", "judge_policy")
    }


@contextmanager
def make_site(folder: Path) -> Iterator[tuple[Toy, Toy]]:
    """The shared repository, remote and servers, and two checkouts."""
    make_repository(folder)
    with ExitStack() as stack:
        prefect = stack.enter_context(start_prefect(folder / "servers", free_port()))
        tracking = stack.enter_context(start_mlflow(folder / "servers", free_port()))
        checkouts = []
        for name in ("near", "far"):
            checkout = Toy(folder / name, prefect, {"MLFLOW_TRACKING_URI": tracking.url, "OMP_NUM_THREADS": "1"})
            checkout.folder.mkdir()
            subprocess.run(["git", "clone", "-q", folder / "git", checkout.project], check=True, timeout=60)
            add_remote(checkout, folder)
            checkouts.append(checkout)
        yield checkouts[0], checkouts[1]


def make_repository(folder: Path) -> None:
    """This project with tiny settings, as a bare git repository; the base model is in the DVC remote alone."""
    seed = folder / "seed"
    for name in ("stages", "flows", "inputs"):
        shutil.copytree(ROOT / name, seed / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", "params.yaml", ".dvcignore", ".gitignore", "pyproject.toml"):
        shutil.copy(ROOT / name, seed / name)
    save_tiny_model(seed / "inputs/model/tiny", head_dim=32)
    project = Project(seed)
    dvc = [sys.executable, "-m", "dvc"]
    for command in (
        *(["git", "init", "-q", "-b", "main"], [*dvc, "init", "-q"], [*dvc, "add", "-q", "inputs/model/tiny"]),
        *([*dvc, "remote", "add", "--local", "--default", "shared", folder / "dvc-remote"], [*dvc, "push", "-q"]),
    ):
        subprocess.run(command, cwd=seed, check=True, timeout=60)
    project.edit(SETTINGS)
    identity = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
    subprocess.run(["git", "add", "--all"], cwd=seed, check=True, timeout=60)
    subprocess.run(["git", *identity, "commit", "-q", "-m", "tiny"], cwd=seed, check=True, timeout=60)
    subprocess.run(["git", "clone", "-q", "--bare", seed, folder / "git"], check=True, timeout=60)


def add_remote(checkout: Toy, folder: Path) -> None:
    done = checkout.run(
        sys.executable, "-m", "dvc", "remote", "add", "--local", "--default", "shared", str(folder / "dvc-remote")
    )
    assert done.returncode == 0, done.stderr
