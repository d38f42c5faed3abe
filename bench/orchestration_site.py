"""What the orchestration drill is done to: a checkout with a tiny model, the services, a worker; everything below us.

The process that makes a site adopts orphans, so nothing that the site started can hide from it.
"""

import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from drill_run import list_children
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import PrefectHTTPStatusError
from reports import describe_code

from flows.service_state import State, read_state
from flows.workspace import name_run
from stages.common.process import free_port

ROOT = Path(__file__).parents[1]
PR_SET_CHILD_SUBREAPER = 36
START_S = 300.0
MAKE = (
    "import shutil, sys; from pathlib import Path; from tests.integration.conftest import make_project; "
    "make_project(Path(sys.argv[1])).edit(__import__('json').loads(sys.argv[2]))"
)
NUM_UPDATES = 200
SETTINGS: dict[str, Any] = {
    "model.source": {"kind": "path", "path": "inputs/model/tiny"},
    "sft.batch_size": 2,
    "sft.num_epochs": 6,
    "rl.num_updates": NUM_UPDATES,
    "rl.eval_every": 100,
    "rl.checkpoint_every": 5,
    "rl.keep_checkpoints": 0,
    # Most completions of a random model do not end, so all of a prompt often score the same, and are no pair.
    "rl.algorithm": {"name": "rloo"},
    "rl.learner.lr": 1e-5,
}


@dataclass(frozen=True)
class Line:
    """Of a stage's output, and when it was seen."""

    at: float
    text: str


class Watch:
    """Reads a stage's log as it grows, ten times a second."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[Line] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._is_over.set()
        self._thread.join()

    def find_update(self, number: int) -> bool:
        """Whether this update, or a later one, was made."""
        return any(made >= number for made in (read_update(line.text) for line in list(self.lines)) if made)

    def _run(self) -> None:
        offset, rest = 0, ""
        while True:
            is_last = self._is_over.is_set()
            if self.path.exists():
                with self.path.open(encoding="utf-8", errors="replace") as file:
                    file.seek(offset)
                    *whole, rest = (rest + file.read()).split("\n")
                    offset = file.tell()
                self.lines += [Line(time.monotonic(), text) for text in whole]
            if is_last:
                return
            self._is_over.wait(0.1)


class Site:
    """The checkout, its services and its workers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.project = folder / "checkout"
        self.services = folder / "services"
        self.ports = {"prefect": free_port(), "mlflow": free_port(), "postgres": free_port()}
        self.worker: subprocess.Popen[bytes] | None = None
        self.num_workers = 0
        self.code = describe_code()
        """That its checkout holds."""

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
        return {
            **kept,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(self.project),
            "OMP_NUM_THREADS": "1",
            "DVC_SITE_CACHE_DIR": str(self.folder / "site"),
            "PREFECT_HOME": str(self.folder / "prefect-client"),
            "PREFECT_API_URL": f"{self.prefect_url}/api",
            "MLFLOW_TRACKING_URI": self.mlflow_url,
        }

    @property
    def prefect_url(self) -> str:
        return f"http://127.0.0.1:{self.ports['prefect']}"

    @property
    def mlflow_url(self) -> str:
        return f"http://127.0.0.1:{self.ports['mlflow']}"

    @property
    def state(self) -> State:
        state = read_state(self.services)
        assert state is not None, "the services are gone"
        return state

    def run(self, *command: str, folder: Path | None = None, timeout_s: float = START_S) -> str:
        """What a command printed; it must succeed."""
        done = subprocess.run(
            command, cwd=folder or self.project, env=self.environment, capture_output=True, text=True, timeout=timeout_s
        )
        if done.returncode:
            raise RuntimeError(
                f"{' '.join(command)} exited {done.returncode}: {done.stdout[-800:]}{done.stderr[-800:]}"
            )
        return done.stdout

    def python(self, *arguments: str, folder: Path | None = None) -> str:
        return self.run(sys.executable, "-m", *arguments, folder=folder)

    def start_services(self) -> None:
        ports = [text for name, port in self.ports.items() for text in (f"--{name}-port", str(port))]
        # Its output goes to a file: a pipe that the supervisor inherits would never be closed.
        with (self.folder / "up.log").open("w") as log:
            command = [sys.executable, "-m", "flows.services", "up", "--folder", str(self.services), *ports]
            subprocess.run(
                command, cwd=self.project, env=self.environment, stdout=log, stderr=log, timeout=600, check=True
            )

    def start_worker(self) -> None:
        """`python -m flows.worker`, until it says that it works."""
        self.num_workers += 1
        log_path = self.folder / f"worker-{self.num_workers}.log"
        with log_path.open("wb") as log:
            command = [sys.executable, "-m", "flows.worker", "--pool", "local"]
            self.worker = subprocess.Popen(
                command, cwd=self.project, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        wait(lambda: "working for" in log_path.read_text() or self.worker.poll() is not None, 120)
        if self.worker.poll() is not None:
            raise RuntimeError(f"the worker ended: {log_path.read_text()[-800:]}")

    def stop_worker(self) -> None:
        if self.worker is not None and self.worker.poll() is None:
            self.worker.terminate()
            self.worker.wait(120)

    def list_worker_processes(self) -> list[psutil.Process]:
        """`flows.worker` and the `prefect worker` of each pool."""
        if self.worker is None or self.worker.poll() is not None:
            return []
        ours = psutil.Process(self.worker.pid)
        return [ours, *ours.children()]

    def list_service_processes(self) -> list[psutil.Process]:
        supervisor = psutil.Process(self.state.pid)
        return [supervisor, *supervisor.children(recursive=True)]

    def list_others(self) -> list[psutil.Process]:
        """Everything below us that is neither a worker nor a service: flow runs, stages, their guards."""
        known = {process.pid for process in [*self.list_worker_processes(), *self.list_service_processes()]}
        return [process for process in list_children() if process.pid not in known]

    def server_pid(self, name: str) -> int:
        pid = next(service.pid for service in self.state.services if service.name == name)
        assert pid is not None, f"{name} does not run"
        return pid

    def start_run(self, overrides: dict[str, Any]) -> FlowRun:
        with self.client() as api:
            found = api.read_deployment_by_name("rlhf/local")
            return api.create_flow_run_from_deployment(found.id, parameters={"run": {"overrides": overrides}})

    def read_run(self, run: FlowRun) -> FlowRun | None:
        """As the server knows it; None while it is away."""
        try:
            with self.client() as api:
                return api.read_flow_run(run.id)
        except (httpx.HTTPError, PrefectHTTPStatusError):
            return None

    def client(self) -> SyncPrefectClient:
        return SyncPrefectClient(f"{self.prefect_url}/api")

    def clone(self, run: FlowRun) -> Path:
        return self.project / ".slipstream/runs" / name_run(run)


@contextlib.contextmanager
def make_site(folder: Path) -> Iterator[Site]:
    """A site whose services run; nothing of it is left at the end."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    folder.chmod(0o755)  # PostgreSQL may run as another user, who must get there
    site = Site(folder)
    require_checkout(site)
    try:
        site.start_services()
        site.start_worker()
        yield site
        site.stop_worker()
        site.python("flows.services", "down", "--folder", str(site.services))
    finally:
        kill_children()


def require_checkout(site: Site) -> None:
    """A checkout of the present code; one of another is refused, or old code would be drilled under a new commit."""
    code, note = site.code, site.folder / "code.txt"
    if not site.project.exists():
        make_checkout(site)
        note.write_text(code)
    elif not note.exists() or note.read_text() != code:
        old = note.read_text() if note.exists() else "unknown code"
        raise SystemExit(f"--workspace {site.folder}: holds a checkout of {old}, now {code}; name another folder")


def make_checkout(site: Site) -> None:
    """A commit of this project with a two-layer model."""
    settings = json.dumps(SETTINGS)
    command = [sys.executable, "-c", MAKE, str(site.project), settings]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, timeout=START_S)
    (site.project / "inputs/model").mkdir(parents=True, exist_ok=True)
    (site.project / "tiny").rename(site.project / "inputs/model/tiny")
    for name in ("pyproject.toml", "prefect.yaml"):
        (site.project / name).write_bytes((ROOT / name).read_bytes())
    site.run("git", "add", "--all")
    site.run("git", "-c", "user.name=d", "-c", "user.email=d@localhost", "commit", "-q", "-m", "tiny")


def kill_children() -> None:
    for _ in range(20):
        children = list_children()
        send(signal.SIGKILL, children)
        if not children:
            return
        time.sleep(0.2)


def send(number: int, processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def list_ports(processes: Sequence[psutil.Process]) -> list[int]:
    """On which these listen."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            found += [item.laddr[1] for item in process.net_connections("inet") if item.status == psutil.CONN_LISTEN]
    return sorted(set(found))


def is_taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def read_update(text: str) -> int | None:
    match = re.search(r"\bupdate=(\d+)/", text)
    return int(match[1]) if match else None


def wait(is_true: Callable[[], object], limit_s: float) -> bool:
    """Wait until something holds; whether it did in time."""
    deadline = time.monotonic() + limit_s
    while not is_true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
