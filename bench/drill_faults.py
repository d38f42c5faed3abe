"""The faults of drill.py: which there are, and what came of each."""

import random
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

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
    """Until the first update after it was noticed, or the end of a run that was ending."""
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


def name_way(fault: Fault) -> str:
    """How it was noticed, in a few words."""
    if fault.target == "learner":
        return fault.noticed.split(";")[0] + (", servers taken for lost" if "; " in fault.noticed else "")
    return next((way for pattern, way in WAYS.items() if re.search(pattern, fault.noticed)), fault.noticed or "NOT")


def format_table(faults: Sequence[Fault]) -> str:
    """Markdown: a row per target and signal."""
    lines = [
        "| target | signal | faults | at a publication | noticed by | until noticed, s | until updated or over, s |",
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
        "Seconds are median / worst, from the signal on; in place of an update that did not come, the end of the run.",
    ]
    lines += ["A lost server is said to be lost once it has been ended, which takes 5 s where it does not react."]
    return "\n".join(lines)


def format_seconds(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.1f} / {max(known):.1f}" if known else "–"
