"""A git and DVC repository with our stages' names, each a script of milliseconds; and a worker of it.

Every stage that runs adds its name to `runs.log` beside the repository. While a file `hold-STAGE` lies there, the stage
waits in the middle. With `TOY_TRACKED` in its environment it tells MLflow of itself, the judge with a win-rate that
depends on the seed.
"""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from flows.parameters import STAGES
from flows.servers import Server, start_prefect
from stages.common.process import GuardedProcess, free_port, start_guarded

ROOT = Path(__file__).parents[2]
SECTIONS = {
    "prepare_data": "data",
    "train_sft": "sft",
    "label_pairs": "pairs",
    "train_reward": "reward",
    "train_policy": "rl",
}
"""Section of params.yaml that a stage's out depends on, beside the out of the stage before."""
SCRIPT = f"""
import contextlib, os, pathlib, sys, time
sys.path.append({str(ROOT)!r})
from stages.common.config import read_params
from stages.common.entry import run_entry
from stages.common.errors import SettingError
from stages.common.tracking import track_stage

def main():
    name = sys.argv[1]
    is_tracked = "TOY_TRACKED" in os.environ
    with track_stage(name, None) if is_tracked else contextlib.nullcontext() as tracker:
        work(name, tracker)

def work(name, tracker):
    outside = pathlib.Path(os.environ["TOY_FOLDER"])
    with open(outside / "runs.log", "a") as log:
        log.write(name + "\\n")
    seed = read_params()["rl"]["seed"]
    for update in range(3):
        print(f"update={{update + 1}}/3 loss=0.5", flush=True)
        if tracker:
            tracker.log_metrics({{"learner/loss": 1 / (update + 1)}}, update + 1)
    if tracker and name == "judge_policy":
        tracker.log_summary({{"judge/gold_win_rate": 0.5 + seed / 4}})
    if seed == 666 and name == "train_policy":
        raise SettingError("rl.seed=666: this toy refuses it")
    (outside / f"pid-{{name}}").write_text(str(os.getpid()))
    while (outside / f"hold-{{name}}").exists():
        time.sleep(0.05)
    out = pathlib.Path("artifacts") / name
    out.mkdir(parents=True, exist_ok=True)
    before = pathlib.Path("artifacts", sys.argv[2], "out.txt").read_text() if len(sys.argv) > 2 else ""
    own = read_params().get({SECTIONS!r}.get(name), "")
    (out / "out.txt").write_text(before + f"{{name}} {{own}}\\n")

run_entry(main)
"""


@dataclass
class Toy:
    """The repository, and what a worker of it needs."""

    folder: Path
    server: Server | None = None
    extra: dict[str, str] = field(default_factory=dict)

    @property
    def project(self) -> Path:
        return self.folder / "project"

    @property
    def environment(self) -> dict[str, str]:
        url = {"PREFECT_API_URL": f"{self.server.url}/api"} if self.server else {}
        return {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "TOY_FOLDER": str(self.folder),
            "SLIPSTREAM_CHECKOUT": str(self.project),
            "DVC_SITE_CACHE_DIR": str(self.folder / "site"),
            "PREFECT_HOME": str(self.folder / "prefect-client"),
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "MLFLOW_TRACKING_URI": f"sqlite:///{self.folder / 'mlflow.db'}",
            **url,
            **self.extra,
        }

    def run(self, *command: str, timeout_s: float = 200) -> "subprocess.CompletedProcess[str]":
        """A command in the repository."""
        return subprocess.run(
            command, cwd=self.project, env=self.environment, capture_output=True, text=True, timeout=timeout_s
        )

    def runs(self) -> list[str]:
        """Stages that have run, in order."""
        path = self.folder / "runs.log"
        return path.read_text().split() if path.exists() else []

    def hold(self, stage: str) -> Path:
        """Make a stage wait in its middle until the file that is returned is deleted."""
        path = self.folder / f"hold-{stage}"
        path.touch()
        return path

    def pid(self, stage: str) -> int:
        """Of a stage that has started."""
        path = self.folder / f"pid-{stage}"
        wait_for(path.exists, 240)
        return int(path.read_text())

    @contextmanager
    def worker(self, *pools: str, devices: str | None = None, **environment: str) -> Iterator[GuardedProcess]:
        """`python -m flows.worker`, ready to work."""
        command = [sys.executable, "-m", "flows.worker"]
        for pool in pools:
            command += ["--pool", pool]
        command += [] if devices is None else ["--devices", devices]
        log_path = self.folder / f"worker-{'-'.join(pools) or 'default'}-{time.monotonic_ns()}.log"
        with start_guarded(command, env={**self.environment, **environment}, log_path=log_path) as worker:
            wait_for(lambda: "working for" in worker.tail(50) or worker.poll() is not None, 240)
            assert worker.poll() is None, worker.tail()
            yield worker


def make_toy(folder: Path) -> Toy:
    """Make the repository, with one commit."""
    project = folder / "project"
    project.mkdir(parents=True)
    (project / "stage.py").write_text(SCRIPT)
    shutil.copyfile(ROOT / "params.yaml", project / "params.yaml")
    (project / "dvc.yaml").write_text("stages:\n" + "".join(_describe(index) for index in range(len(STAGES))))
    (project / ".gitignore").write_text("/artifacts/\n/.slipstream/\n")
    toy = Toy(folder)
    for command in (
        ["git", "init", "--quiet", "--initial-branch=main"],
        [sys.executable, "-m", "dvc", "init", "--quiet"],
        ["git", "add", "--all"],
        ["git", "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "--quiet", "-m", "toy"],
    ):
        done = toy.run(*command)
        assert done.returncode == 0, done.stderr
    return toy


@contextmanager
def toy_with_server(folder: Path, environment: Mapping[str, str] | None = None) -> Iterator[Toy]:
    """The repository and a Prefect server."""
    toy = make_toy(folder)
    toy.extra |= environment or {}
    with start_prefect(folder / "server", free_port()) as server:
        toy.server = server
        yield toy


def wait_for(is_true: Callable[[], object], timeout_s: float = 60) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, "timed out"
        threading.Event().wait(0.1)


def _describe(index: int) -> str:
    name, before = STAGES[index], STAGES[index - 1] if index else ""
    deps = ["stage.py"] + ([f"artifacts/{before}"] if index else [])
    return (
        f"  {name}:\n    cmd: exec python stage.py {name} {before}\n    deps: [{', '.join(deps)}]\n"
        f"    params: [{SECTIONS.get(name, 'model')}]\n    outs: [artifacts/{name}]\n"
    )
