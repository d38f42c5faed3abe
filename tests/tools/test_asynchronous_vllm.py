"""Asynchronous RL with a real vLLM server on a two-layer model: killed, resumed, checked, replayed."""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import psutil
import pytest

from stages.learner.checkpoint import find_checkpoint
from stages.rl.ledger.checks.run import check_ledger
from stages.rl.ledger.reader import read_ledger
from tests import tiny_rl
from tests.processes import watched

ROOT = Path(__file__).parents[2]
SHM = Path("/dev/shm")
TIMEOUT_S = 250
SETTINGS: dict[str, Any] = {
    "num_updates": 10,
    "max_staleness": 2,
    "checkpoint_every": 2,
    "eval_every": 5,
    "weight_update": "in_flight",
    "generation": {"engine": "vllm", "max_new_tokens": 24, "kv_cache_gib": 1},
}


def start(directory: Path, settings: dict[str, Any]) -> AbstractContextManager["subprocess.Popen[str]"]:
    command = [sys.executable, "-m", "tests.tiny_rl", str(directory), json.dumps(settings)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return watched(command, cwd=ROOT, env=env, timeout_s=TIMEOUT_S, stderr=subprocess.PIPE)


def wait_for_line(process: "subprocess.Popen[str]", words: str) -> None:
    assert process.stderr is not None
    seen: list[str] = []
    for line in process.stderr:
        seen.append(line)
        if words in line:
            return
    raise AssertionError(f"ended with {process.wait()} before {words!r}: {seen[-15:]}")


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 60
    while any(psutil.pid_exists(pid) for pid in pids):
        assert time.monotonic() < deadline, [psutil.Process(pid).cmdline() for pid in pids if psutil.pid_exists(pid)]
        time.sleep(0.1)


def list_shared_memory() -> set[str]:
    return set(os.listdir(SHM)) if SHM.exists() else set()


def wait_until_removed(names: set[str]) -> None:
    """What other runs of this machine have in shared memory goes with them; what is left behind stays."""
    deadline = time.monotonic() + 120
    while names & list_shared_memory():
        assert time.monotonic() < deadline, names & list_shared_memory()
        time.sleep(0.1)


@pytest.mark.timeout(600)
def test_a_killed_run_resumes_keeps_its_bound_and_replays_to_its_weights_twice(tmp_path: Path) -> None:
    before = list_shared_memory()
    directory = tmp_path / "run"
    directory.mkdir()
    tiny_rl.make_inputs(directory, head_dim=32)

    with start(directory, SETTINGS) as killed:
        wait_for_line(killed, "update=5/")
        children = [child.pid for child in psutil.Process(killed.pid).children(recursive=True)]
    wait_until_gone(children)
    checkpoint = find_checkpoint(directory / "work")
    assert checkpoint is not None
    saved_at = checkpoint[1]["sampling"]["num_consumed"] // tiny_rl.SETTINGS["prompts_per_update"]
    with start(directory, SETTINGS) as resumed:
        _, errors = resumed.communicate()

    assert resumed.returncode == 0, errors[-3000:]
    assert saved_at >= 4  # 4, or what it had come to when the kill took effect
    assert f"resumed policy_version={saved_at} " in errors
    ledger = directory / "out/ledger"
    assert [line for check in check_ledger(ledger) for line in check.violations] == []
    recorded = read_ledger(ledger)
    assert [update.update for update in recorded.updates()] == list(range(10))
    assert {row.staleness for update in recorded.updates() for row in update.rows} <= {0, 1, 2}
    # Swapped in the middle of completions, as a server that drains never is.
    assert any(len(sample.versions) > 1 for sample in recorded.samples())
    for number in range(2):
        again = tmp_path / f"replay-{number}"
        for name in ("data", "sft", "reward"):
            shutil.copytree(directory / name, again / name)
        settings = {key: value for key, value in SETTINGS.items() if key != "generation"}
        tiny_rl.run(again, **settings, replay_from=str(ledger))
        assert tiny_rl.hash_policy(again) == tiny_rl.hash_policy(directory)
        assert tiny_rl.hash_policy(again, "policy") == tiny_rl.hash_policy(directory, "policy")
    wait_until_removed(list_shared_memory() - before)
