"""The flow against a real Prefect server that it starts for itself, on a real DVC repository with toy stages."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DVC_YAML = """
stages:
  first: {cmd: "echo 1 > first.txt", outs: [first.txt]}
  second: {cmd: "cp first.txt second.txt", deps: [first.txt], outs: [second.txt]}
"""
RUN_TWICE = """
from flows.rlhf import rlhf
from prefect.client.orchestration import get_client
import asyncio

async def states():
    async with get_client() as client:
        runs = await client.read_task_runs()
        return sorted((run.name, run.state.name) for run in runs)

rlhf(stages=("first", "second"))
rlhf(stages=("first", "second"))
print("STATES", asyncio.run(states()))
"""


def test_stages_are_tasks_and_an_unchanged_stage_shows_as_cached(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], cwd=tmp_path, check=True, timeout=60)
    (tmp_path / "dvc.yaml").write_text(DVC_YAML)
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "true",
    }
    environment.pop("PREFECT_API_URL", None)

    done = subprocess.run(
        [sys.executable, "-c", RUN_TWICE], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
    )

    assert done.returncode == 0, done.stdout + done.stderr
    states = next(line for line in done.stdout.splitlines() if line.startswith("STATES"))
    assert states == (
        "STATES [('first', 'Cached'), ('first', 'Completed'), ('second', 'Cached'), ('second', 'Completed')]"
    )
