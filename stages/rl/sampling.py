"""The learner's side of sampling: what is sent off, what has come back, what may be trained next."""

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stages.common.errors import RunError
from stages.generation.protocol import Finished, Generator, Group, Lost, Request, SamplingPlan, Ticket, WeightsUpdate
from stages.rl.inbox import Arrival, Inbox
from stages.rl.ledger.schema import Event, GroupKey
from stages.rl.ledger.writer import Ledger
from stages.rl.mini_batch import Sampled
from stages.rl.prompts import PromptStream
from stages.rl.staleness import Admission, Outstanding
from stages.rl.stopping import StopSignals

logger = logging.getLogger(__name__)

_POLL_S = 0.5


@dataclass(frozen=True)
class SamplingParts:
    """What sampling works with."""

    generator: Generator
    inbox: Inbox
    stream: PromptStream
    plan: SamplingPlan
    ledger: Ledger
    stop: StopSignals
    stall_timeout_s: float


class Sampling:
    """Tickets out, groups in.

    Args:
        parts: generator, prompts, ledger.
        admission: the staleness rule at work.
    """

    def __init__(self, parts: SamplingParts, admission: Admission) -> None:
        self._parts = parts
        self._admission = admission
        self._ready: dict[int, Sampled] = {}
        self._evaluated: dict[int, Sampled] = {}
        self._attempts: dict[int, int] = {}
        self._recorded: dict[int, int] = {}  # attempts whose groups the ledger has; some wait for their scores
        self._silence_s = 0.0  # waited for since a generator last gave a sign of life
        self.published = 0
        """Newest version by which groups are asked for."""
        self.num_samples = 0
        self.dropped: Counter[str] = Counter()
        """Attempts and groups that were not trained on, by reason."""

    def publish(self, update: WeightsUpdate) -> None:
        """Hand new weights to the generators and ask for what they may sample."""
        self._parts.generator.publish(update)
        self.published = update.policy_version
        ledger = self._parts.ledger  # its own count of the updates: a version may only be published once it is made
        ledger.add_event(Event("published", ledger.num_updates, policy_version=update.policy_version))

    def request(self) -> None:
        """Send off every prompt that the published weights may sample."""
        for number in self._admission.admit(self.published):
            self._submit(number, attempt=0)

    def take(self, update: int) -> list[Sampled]:
        """The groups of the next mini-batch, in the order of their tickets; waits for them.

        Raises:
            StopRequested: the run is to end; nothing was taken.
            GeneratorError, RunError: they will not come.
        """
        while True:
            for number in self._admission.find_too_old(update):
                self._drop_stale(number, update)
            chosen = self._admission.choose()
            if chosen is not None:
                self._admission.consume(chosen)
                return [self._forget(number) for number in sorted(chosen)]
            self._wait(update)

    def discard(self, sampled: Sequence[Sampled], update: int, reason: str) -> None:
        """Give tickets up that were taken, and ask for others in their places."""
        self._admission.num_consumed -= len(sampled)
        self.dropped[reason] += len(sampled)
        for item in sampled:
            self._add_event("discarded", update, item.ticket, reason)
        self.request()

    def request_evaluation(self, requests: Sequence[Request]) -> None:
        """Ask for one completion of each validation prompt, by the published weights."""
        for place, request in enumerate(requests):
            self._parts.generator.submit(Ticket(-1 - place, request, SamplingPlan(1)))

    def take_evaluation(self, num_prompts: int, update: int) -> list[Sampled]:
        """Wait for what `request_evaluation` asked for, in its order."""
        while len(self._evaluated) < num_prompts:
            self._wait(update)
        evaluated, self._evaluated = self._evaluated, {}
        return [evaluated[-1 - place] for place in range(num_prompts)]

    def settle(self, update: int) -> None:
        """Wait for what was sent off under weights older than this version; only they could sample it again."""
        while any(not entry.is_ready and entry.version < update for entry in self._admission.outstanding.values()):
            self._wait(update, may_stop=False)

    def state(self) -> dict[str, Any]:
        """What a resume needs, as JSON; the groups themselves are in the ledger."""
        return {
            "num_consumed": self._admission.num_consumed,
            "next_ticket": self._admission.next_ticket,
            "ready": dict(self._recorded),
            "waiting": {
                number: self._attempts.get(number, 0)
                for number, entry in self._admission.outstanding.items()
                if number not in self._recorded
            },
            "num_samples": self.num_samples,
            "dropped": dict(self.dropped),
        }

    def restore(self, state: dict[str, Any], groups: Mapping[GroupKey, Group], update: int) -> None:
        """Take up what `state` described: finished groups from the ledger, the others are asked for again.

        Call it once the weights of version `update` are published.
        """
        admission = self._admission
        self.published = update
        admission.num_consumed, admission.next_ticket = state["num_consumed"], state["next_ticket"]
        self.num_samples, self.dropped = state["num_samples"], Counter(state["dropped"])
        for (number, attempt), group in groups.items():
            sampled = Sampled(replace(self._ticket(number), attempt=attempt), group)
            admission.outstanding[number] = Outstanding(sampled.policy_version)
            self._attempts[number] = self._recorded[number] = attempt
            if self._parts.inbox.is_scoring:
                self._parts.inbox.score(sampled)
            else:
                self._arrive(sampled)
        for number, attempt in sorted((int(number), attempt) for number, attempt in state["waiting"].items()):
            admission.outstanding[number] = Outstanding(update)
            self._submit(number, attempt)

    def _submit(self, number: int, attempt: int) -> None:
        self._attempts[number] = attempt
        self._parts.generator.submit(replace(self._ticket(number), attempt=attempt))

    def _ticket(self, number: int) -> Ticket:
        return Ticket(number, self._parts.stream.get(number), self._parts.plan)

    def _forget(self, number: int) -> Sampled:
        self._attempts.pop(number, None)
        self._recorded.pop(number)
        return self._ready.pop(number)

    def _drop_stale(self, number: int, update: int) -> None:
        """Throw a group away that came too late, and ask for its prompt again."""
        ticket = self._forget(number).ticket
        self.dropped["stale"] += 1
        self._add_event("dropped", update, ticket, "stale")
        self._admission.reissue(number, self.published)
        self._submit(number, ticket.attempt + 1)

    def _wait(self, update: int, *, may_stop: bool = True) -> None:
        """Take in what has arrived; wait for something to arrive."""
        while True:
            if may_stop:
                self._parts.stop.check()
            began = time.monotonic()
            arrivals = self._parts.inbox.wait(_POLL_S)
            self._silence_s += time.monotonic() - began
            for arrival in arrivals:
                self._handle(arrival, update)
            if not all(isinstance(arrival, Lost) for arrival in arrivals):
                self._silence_s = 0.0  # a loss is no sign of life: the same one may come again and again
            if self._silence_s > self._parts.stall_timeout_s:
                waiting = [n for n, entry in self._admission.outstanding.items() if not entry.is_ready]
                raise RunError(
                    f"nothing came from the generator or from scoring for rl.stall_timeout_s="
                    f"{self._parts.stall_timeout_s:.0f} while {len(waiting)} prompts of training, or those of an "
                    f"evaluation, are with them; published policy_version={self.published}"
                )
            if arrivals:
                return

    def _handle(self, arrival: Arrival, update: int) -> None:
        if isinstance(arrival, Sampled):
            self._arrive(arrival)
        elif isinstance(arrival, Finished):
            if arrival.ticket.number >= 0:
                self.num_samples += len(arrival.group)
                ticket = arrival.ticket
                self._attempts[ticket.number] = self._recorded[ticket.number] = ticket.attempt
                self._parts.ledger.add_group(ticket.number, ticket.attempt, arrival.group, arrival.replica)
        elif isinstance(arrival, Lost) and arrival.ticket.number >= 0:
            self.dropped[arrival.reason] += 1
            self._attempts[arrival.ticket.number] = arrival.ticket.attempt + 1
            # It was sent off again already, perhaps by older weights than the newest: its entry stays as it is.
            self._add_event("lost", update, arrival.ticket, arrival.reason)

    def _arrive(self, sampled: Sampled) -> None:
        number = sampled.ticket.number
        if number < 0:
            self._evaluated[number] = sampled
            return
        self._ready[number] = sampled
        self._admission.finish(number, sampled.policy_version)

    def _add_event(self, kind: Any, update: int, ticket: Ticket, reason: str) -> None:
        event = Event(kind, update=update, ticket=ticket.number, attempt=ticket.attempt, reason=reason)
        self._parts.ledger.add_event(event)
