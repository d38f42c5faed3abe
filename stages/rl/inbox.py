"""Everything that comes from the generator, scored on the way where scoring has a device of its own."""

import queue
import threading
import time
from collections.abc import Callable

from stages.common.errors import RunError
from stages.generation.protocol import Event, Finished, Generator, Lost, Published, RecordSpan
from stages.rl.mini_batch import Sampled
from stages.rl.scoring import ScoredGroup, ScoringProcess
from stages.rl.timeline import SCORER

_POLL_S = 0.2

Arrival = Sampled | Finished | Lost | Published
"""Finished: a group was sampled, for the ledger. Sampled: it can be trained on."""
StartScoring = Callable[[Callable[[int, ScoredGroup], None], Callable[[RunError], None]], ScoringProcess]


class Inbox:
    """Arrivals in the order they happened. Use `close`.

    Args:
        generator: where groups come from.
        start_scoring: starts the scoring process, given what to call with results and with a failure; None: groups
            are scored when they are trained on.
        record: told when the scoring process works.
        kind: what it does then: `score`, with the reference where it has that too, or `reference` alone.
    """

    def __init__(
        self, generator: Generator, start_scoring: StartScoring | None, record: RecordSpan, kind: str = "score"
    ) -> None:
        self._generator = generator
        self._record = record
        self._kind = kind
        self._scoring: ScoringProcess | None = None
        if start_scoring is None:
            return
        self._arrivals: queue.Queue[Arrival | Exception] = queue.Queue()
        self._sampled: dict[int, Sampled] = {}
        self._sent: dict[int, float] = {}
        self._free_since = 0.0
        self._is_closed = threading.Event()
        self._scoring = start_scoring(self._deliver, self._arrivals.put)
        self._thread = threading.Thread(target=self._forward, name="inbox", daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float) -> list[Arrival]:
        """What has arrived since the last call; waits for something, at most so long.

        Raises:
            GeneratorError, RunError: generator or scoring cannot go on.
        """
        if self._scoring is None:
            return [arrival for event in self._generator.wait(timeout_s) for arrival in _without_scores(event)]
        arrivals: list[Arrival] = []
        try:
            item = self._arrivals.get(timeout=timeout_s)
            while True:
                if isinstance(item, Exception):
                    raise item
                arrivals.append(item)
                item = self._arrivals.get_nowait()
        except queue.Empty:
            return arrivals

    def score(self, sampled: Sampled) -> None:
        """Have a group scored that was sampled before this process began."""
        assert self._scoring is not None
        self._sampled[sampled.ticket.number] = sampled
        self._sent[sampled.ticket.number] = time.monotonic()
        # Evaluations have numbers below 0.
        self._scoring.submit(sampled.ticket.number, sampled.group, with_reference=sampled.ticket.number >= 0)

    @property
    def is_scoring(self) -> bool:
        """Whether groups arrive with scores."""
        return self._scoring is not None

    def close(self) -> None:
        """End the scoring process."""
        if self._scoring is not None:
            self._is_closed.set()
            self._thread.join()
            self._scoring.close()

    def _forward(self) -> None:
        try:
            while not self._is_closed.is_set():
                for event in self._generator.wait(_POLL_S):
                    self._arrivals.put(event)
                    if isinstance(event, Finished):
                        self.score(Sampled(event.ticket, event.group))
        except Exception as error:  # noqa: BLE001  whatever it is, the learner would wait for arrivals that never come
            self._arrivals.put(error)

    def _deliver(self, key: int, scored: ScoredGroup) -> None:
        sampled, now = self._sampled.pop(key), time.monotonic()
        # It works on one group after the other.
        self._record(SCORER, self._kind, max(self._sent.pop(key), self._free_since), now, sampled.policy_version)
        self._free_since = now
        self._arrivals.put(Sampled(sampled.ticket, sampled.group, scored))


def _without_scores(event: Event) -> list[Arrival]:
    if isinstance(event, Finished):
        return [event, Sampled(event.ticket, event.group)]
    return [event]
