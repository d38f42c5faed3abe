"""A training run under drill.py: starting it, what it says, its processes, and what is left of it."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
SHARED_MEMORY = Path("/dev/shm")
sys.path.insert(0, str(ROOT))

from stages.common.entry import die_with_parent  # noqa: E402
from stages.rl.ledger.checks.run import check_ledger  # noqa: E402
from stages.rl.ledger.reader import read_ledger  # noqa: E402

LEFT_S = 15.0
"""Time for everything of a finished run to be gone."""


class Run:
    """The training command and what it says, over all processes it takes."""

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        self.directory = directory
        self.updates: list[tuple[float, int]] = []
        self.losses: list[tuple[float, str, str]] = []
        self.ready: dict[str, tuple[float, int]] = {}
        """Since when servers are ready, and their ports."""
        self.ports: set[int] = set()
        self.resumed_at = 0
        self.tail: list[str] = []
        self.learners: list[int] = []
        self.pids: set[int] = set()
        """Of everything that was started, looked at once a second."""
        self.temporary = directory / "tmp"
        self.temporary.mkdir()
        # Servers compile a little code when they sample for the first time; all of them share it.
        code = os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / "slipstream-drill-code"))
        self._environment = {"OMP_NUM_THREADS": "1", "TMPDIR": str(self.temporary), "TORCHINDUCTOR_CACHE_DIR": code}
        self._command = [sys.executable, "-m", "tests.tiny_rl", str(directory), json.dumps(settings)]

    def start(self) -> None:
        self.ready.clear()
        self.resumed_at = 0
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            self._command,
            cwd=ROOT,
            env=os.environ | self._environment,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C is for the drill, which ends everything in order
            preexec_fn=lambda: die_with_parent(signal.SIGKILL),
        )
        self.learners.append(self.process.pid)
        self.pids.add(self.process.pid)
        self._reader = threading.Thread(target=self._read, args=(self.process,), daemon=True)
        self._reader.start()
        threading.Thread(target=self._count, args=(self.process,), daemon=True).start()

    def is_over(self) -> bool:
        if self.process.poll() is None:
            return False
        self._reader.join(timeout=2)
        return True

    def num_updates(self) -> int:
        return self.updates[-1][1] if self.updates else 0

    def find_update(self, after: float) -> float | None:
        return next((at for at, _ in list(self.updates) if at > after), None)

    def find_loss(self, name: str, after: float) -> tuple[float, str] | None:
        return next(((at, reason) for at, lost, reason in list(self.losses) if lost == name and at > after), None)

    def scratch(self) -> Path | None:
        return next(SHARED_MEMORY.glob(f"slipstream-{self.process.pid}-*"), None)

    def _read(self, process: "subprocess.Popen[str]") -> None:
        assert process.stderr is not None
        with (self.directory / "run.log").open("a") as log:
            for line in process.stderr:
                log.write(line)
                log.flush()
                self.tail = [*self.tail[-30:], line.rstrip()]
                self._note(time.monotonic(), line)

    def _count(self, process: "subprocess.Popen[str]") -> None:
        while process.returncode is None:
            with contextlib.suppress(psutil.Error):
                self.pids.update(child.pid for child in psutil.Process().children(recursive=True))
            time.sleep(1)

    def _note(self, now: float, line: str) -> None:
        if found := re.search(r": update=(\d+)/", line):
            self.updates.append((now, int(found[1])))
        elif found := re.search(r": (generator-\d+) is ready url=http://127\.0\.0\.1:(\d+)", line):
            self.ports.add(int(found[2]))
            self.ready[found[1]] = now, int(found[2])
        elif found := re.search(r": (generator-\d+) is lost: (.*?)(;|$)", line):
            self.ready.pop(found[1], None)
            self.losses.append((now, found[1], found[2]))
        elif found := re.search(r": the scoring process (.*), starting it again", line):
            self.losses.append((now, "scoring", found[1]))
        elif found := re.search(r": resumed policy_version=(\d+)", line):
            self.resumed_at = int(found[1])


def find_guarded(run: Run, needle: str) -> psutil.Process:
    """The command below the guard whose command line holds this."""
    for guard in psutil.Process(run.process.pid).children():
        if needle in " ".join(guard.cmdline()) + " ":
            return guard.children()[0]
    raise psutil.NoSuchProcess(0)


def find_server_process(run: Run, port: int, target: str) -> psutil.Process:
    server = find_guarded(run, f"--port {port} ")
    if target == "server":
        return server
    title = {"engine": "VLLM::EngineCore", "worker": "VLLM::Worker"}[target]
    return next(
        (child for child in server.children(recursive=True) if title in " ".join(child.cmdline())),
        server if target == "engine" else find_server_process(run, port, "engine"),  # in one process with it
    )


def wait_for_publication(run: Run, limit_s: float) -> str | None:
    """Return the moment a file of published weights appears or is written over; its name."""
    scratch, deadline = run.scratch(), time.monotonic() + limit_s
    if scratch is None:
        return None
    before = list_written(scratch)
    while time.monotonic() < deadline and scratch.is_dir():
        written = list_written(scratch)
        if written - before:
            return min(written - before)[0]
        before = written
        time.sleep(0.0003)
    return None


def list_written(directory: Path) -> set[tuple[str, int]]:
    """Its files, and when each was last written."""
    found = set()
    with contextlib.suppress(FileNotFoundError):  # servers delete files, the run its directory
        for entry in os.scandir(directory):
            with contextlib.suppress(FileNotFoundError):
                found.add((entry.name, entry.stat().st_mtime_ns))
    return found


def list_shared_memory() -> set[str]:
    return set(os.listdir(SHARED_MEMORY))


def find_left(shared_memory: set[str], run: Run) -> dict[str, list[str]]:
    """What is still there of a run that has ended."""
    deadline = time.monotonic() + LEFT_S
    while True:
        ours = list_children()
        left = {
            "processes": [" ".join(read_command(process)) for process in ours],
            "ports": [str(port) for port in sorted(run.ports) if is_open(port, ours)],
            "shared memory": sorted(list_shared_memory() - shared_memory - list_foreign_memory(run.pids)),
        }
        if not any(left.values()) or time.monotonic() > deadline:
            return left
        time.sleep(0.2)


def is_open(port: int, ours: Sequence[psutil.Process]) -> bool:
    """Whether one of our processes listens there, or nobody knows who does."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) != 0:
            return False
    owners = {item.pid for item in psutil.net_connections("tcp") if item.laddr and item.laddr[1] == port}
    return not (owners - {None} - {process.pid for process in ours} - {os.getpid()})


def list_foreign_memory(ours: set[int]) -> set[str]:
    """Entries of the shared memory that processes of others use, or that carry the pid of one."""
    named = {name: re.search(r"-(\d+)-", name) for name in list_shared_memory()}
    used = {name for name, pid in named.items() if pid and int(pid[1]) not in ours}
    for process in psutil.process_iter():
        if process.pid not in ours | {os.getpid()}:
            with contextlib.suppress(OSError, psutil.Error):
                maps = Path(f"/proc/{process.pid}/maps").read_text(errors="replace")
                opened = " ".join(os.readlink(item) for item in Path(f"/proc/{process.pid}/fd").iterdir())
                used.update(re.findall(rf"{SHARED_MEMORY}/([^\s/]+)", maps + opened))
    return used


def list_children() -> list[psutil.Process]:
    """Everything alive that we started or that was started by it; the dead are buried."""
    alive = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, ChildProcessError):
            if process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
            elif process.ppid() == os.getpid():
                os.waitpid(process.pid, os.WNOHANG)
    return alive


def kill_children() -> None:
    for _ in range(20):
        children = list_children()
        for process in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if not children:
            return
        time.sleep(0.2)


def stop(run: Run) -> None:
    """End the learner if it still runs; its guards end the rest."""
    if run.process.poll() is None:
        run.process.kill()
    run.process.wait()


def read_command(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return [str(process.pid), *process.cmdline()[:6]]
    return [str(process.pid)]


def examine_ledger(directory: Path, num_updates: int) -> dict[str, Any]:
    """Violations by kind, and what happened to attempts."""
    path = directory / "out/ledger"
    if not path.exists():  # its campaign has a failure
        return {}
    found = [(check.name, line) for check in check_ledger(path) for line in check.violations]
    lost = sum("is lost" in line for _, line in found)
    twice = sum("trained at updates" in line or "only one may be" in line for _, line in found)
    bound = sum(name == "bound" for name, _ in found)
    ledger = read_ledger(path)
    made = sum(1 for _ in ledger.updates(with_logprobs=False))
    version = json.loads((directory / "out/policy_last/version.json").read_text())["policy_version"]
    found += [("outputs", "not all updates")] * (not made == version == num_updates)
    ends = Counter(f"attempts {event.kind}, {event.reason}" for event in ledger.events if event.reason is not None)
    rolled_back = {f"{table} rolled back": count for table, count in ledger.num_rolled_back().items()}
    resumes = sum(event.kind == "resumed" for event in ledger.events)
    samples = sum(1 for _ in ledger.samples())
    return {
        "prompts lost": lost,
        "prompts trained twice": twice,
        "bound violations": bound,
        "other violations": len(found) - lost - twice - bound,
        "violations": [f"{name}: {line}" for name, line in found[:20]],
        "counts": {"updates": made, "samples": samples, "resumes": resumes} | rolled_back | dict(sorted(ends.items())),
    }
