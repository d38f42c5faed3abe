"""What each role of the RL stage did when: spans in a file for the picture, totals in memory for the metrics.

Seconds count from the start of the run. A resume goes on at the seconds of its checkpoint; what the lost attempt
did after that checkpoint is in neither the totals nor the file.
"""

import json
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stages.common.publish import write_text

LEARNER = "learner"
SCORER = "scorer"
GENERATOR = "generator"
"""Generators are `generator-0`, `generator-1`, and so on."""

KINDS = (
    "generate",
    "swap",
    "score",
    "reference",
    "learn",
    "publish",
    "evaluate",
    "checkpoint",
    "record",
    "start",
    "wait",
)
MAX_BUFFERED = 1000
"""Spans held in memory before they are written without being asked."""

Totals = dict[tuple[str, str], float]
"""Seconds by role and kind."""


@dataclass(frozen=True, slots=True)
class Span:
    """One thing that one role did."""

    role: str
    kind: str
    start_s: float
    end_s: float
    policy_version: int


class Timeline:
    """Collects spans from all threads."""

    def __init__(self, path: Path, *, offset_s: float = 0.0) -> None:
        """Nothing is read or written before the first `flush`.

        Args:
            path: JSONL file with one span per line. Lines that are not before `offset_s` are dropped.
            offset_s: seconds of earlier attempts.
        """
        self._path = path
        self._created = time.monotonic()
        self._offset_s = offset_s
        self._totals: Totals = {}
        self._buffer: list[Span] = []  # in seconds of time.monotonic, so that `restore` may still move the clock
        self._is_file_ready = False
        self._lock = threading.Lock()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the run began, earlier attempts included."""
        return self._to_run_seconds(time.monotonic())

    @contextmanager
    def span(self, role: str, kind: str, version: int) -> Iterator[None]:
        """Record the block, also when it raises."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.add(role, kind, started, time.monotonic(), version)

    def add(self, role: str, kind: str, started: float, ended: float, version: int) -> None:
        """Record what is over; `started` and `ended` are values of `time.monotonic`."""
        assert kind in KINDS, kind
        with self._lock:
            self._totals[role, kind] = self._totals.get((role, kind), 0.0) + ended - started
            self._buffer.append(Span(role, kind, started, ended, version))
            if len(self._buffer) >= MAX_BUFFERED:
                self._write()

    def totals(self) -> Totals:
        """Seconds by role and kind, earlier attempts included; overlapping spans count each."""
        with self._lock:
            return dict(self._totals)

    def flush(self) -> None:
        """Write all spans so far to the file."""
        with self._lock:
            self._write()

    def state(self) -> dict[str, Any]:
        """Clock and totals as JSON, for a checkpoint; the spans they count are in the file."""
        with self._lock:
            self._write()
            totals = [[role, kind, seconds] for (role, kind), seconds in self._totals.items()]
            return {"elapsed_s": _round(self.elapsed_s), "totals": totals}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave; must come before the first `flush`. Spans added before stay."""
        with self._lock:
            assert not self._is_file_ready
            self._offset_s = state["elapsed_s"]
            for role, kind, seconds in state["totals"]:
                self._totals[role, kind] = self._totals.get((role, kind), 0.0) + seconds

    def _write(self) -> None:
        """Append the buffer to the file; the caller holds the lock."""
        if not self._is_file_ready:
            self._rewind()
            self._is_file_ready = True
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(self._encode(span) for span in self._buffer)
        self._buffer.clear()

    def _rewind(self) -> None:
        """Drop what a lost attempt did after the checkpoint: its seconds come a second time."""
        kept = [span for span in read_spans(self._path) if span.end_s <= self._offset_s]
        write_text(self._path, "".join(json.dumps(asdict(span)) + "\n" for span in kept))

    def _encode(self, span: Span) -> str:
        seconds = {name: _round(self._to_run_seconds(getattr(span, name))) for name in ("start_s", "end_s")}
        return json.dumps(asdict(span) | seconds) + "\n"

    def _to_run_seconds(self, monotonic_s: float) -> float:
        return monotonic_s - self._created + self._offset_s


def read_spans(path: Path) -> list[Span]:
    """All spans of a file; none if there is no file. A last line that a kill has cut is ignored."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [Span(**json.loads(line)) for line in text[: text.rfind("\n") + 1].splitlines()]


def union_s(spans: Iterable[Span]) -> float:
    """Seconds during which at least one of the spans ran."""
    total = 0.0
    covered_until = float("-inf")
    for span in sorted(spans, key=lambda span: span.start_s):
        total += max(0.0, span.end_s - max(span.start_s, covered_until))
        covered_until = max(covered_until, span.end_s)
    return total


def summarise_timeline(totals: Mapping[tuple[str, str], float], elapsed_s: float) -> dict[str, float]:
    """Seconds by what a reader asks for.

    Args:
        totals: from `Timeline.totals`.
        elapsed_s: length of the run; every generator in `totals` is idle when it neither generates, swaps nor starts.
    """
    generators = {role for role, _ in totals if role.startswith(GENERATOR)}
    generator_s = {kind: sum(totals.get((role, kind), 0.0) for role in generators) for kind in KINDS}
    occupied_s = generator_s["generate"] + generator_s["swap"] + generator_s["start"]
    anywhere = {
        "score_s": "score",
        "reference_s": "reference",
        "learn_s": "learn",
        "evaluate_s": "evaluate",
        "checkpoint_s": "checkpoint",
        "ledger_s": "record",
    }
    return {
        "learner_busy_s": sum(seconds for (role, kind), seconds in totals.items() if _is_busy_learner(role, kind)),
        "generator_busy_s": generator_s["generate"],
        "generator_idle_s": max(0.0, len(generators) * elapsed_s - occupied_s),
        "wait_for_rollouts_s": totals.get((LEARNER, "wait"), 0.0),
        "publish_s": totals.get((LEARNER, "publish"), 0.0),
        "swap_s": generator_s["swap"],
        "wall_s": elapsed_s,
    } | {name: sum(s for (_, kind), s in totals.items() if kind == wanted) for name, wanted in anywhere.items()}


def _is_busy_learner(role: str, kind: str) -> bool:
    return role == LEARNER and kind != "wait"


def _round(seconds: float) -> float:
    return round(seconds, 6)
