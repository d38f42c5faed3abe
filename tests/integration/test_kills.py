"""`make run`'s process killed once in every stage: the next run goes on, and finished stages are not repeated."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flows.parameters import STAGES
from tests.integration.conftest import Project, make_project
from tests.processes import watched

WAIT_S = 120


def start_and_kill(project: Project, stage: str) -> list[str]:
    """Start the pipeline, SIGKILL its process in `stage`, wait until all it started is gone; stages begun."""
    log = project.path / "run.log"
    command = [sys.executable, "-m", "flows.dvc"]
    deadline = time.monotonic() + WAIT_S
    with (
        log.open("w") as file,
        watched(
            command, cwd=project.path, env=project.environment, timeout_s=WAIT_S, stdout=file, stderr=subprocess.STDOUT
        ) as runner,
    ):
        # Its line comes through two processes, which a kill would take it along with.
        while f"python -m stages.{stage}" not in running_commands(project) or stage not in begun_stages(
            log.read_text()
        ):
            assert time.monotonic() < deadline, f"{stage} did not start:\n{log.read_text()[-2000:]}"
            assert runner.poll() is None, f"the run ended before {stage}:\n{log.read_text()[-2000:]}"
            time.sleep(0.05)
    while running_commands(project):
        assert time.monotonic() < deadline, f"left behind: {running_commands(project)}"
        time.sleep(0.05)
    return begun_stages(log.read_text())


def running_commands(project: Project) -> str:
    """Command lines of the stages that run in this project's folder."""
    lines = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        command = " ".join(process.info["cmdline"] or [])
        if process.info["cwd"] == str(project.path) and "-m stages." in command:
            lines.append(command.replace(sys.executable, "python"))
    return "\n".join(lines)


def begun_stages(output: str) -> list[str]:
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


@pytest.mark.timeout(600)
def test_a_run_killed_once_in_every_stage_still_finishes_and_repeats_no_finished_stage(tmp_path: Path) -> None:
    project = make_project(tmp_path / "project")
    begun: list[str] = []

    for stage in STAGES:
        begun += start_and_kill(project, stage)
    begun += begun_stages(project.run("flows.dvc").stdout)

    # Every stage began twice: once to be killed, once to finish.
    assert {stage: begun.count(stage) for stage in STAGES} == dict.fromkeys(STAGES, 2)
    assert (project.path / "metrics/judge.json").exists()
    assert begun_stages(project.run("flows.dvc").stdout) == []
