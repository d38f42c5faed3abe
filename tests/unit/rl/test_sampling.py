"""What a checkpoint says of prompts that are on their way, and what ends the wait for them."""

import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from stages.common.errors import RunError
from stages.generation.protocol import Event, Finished, Lost, Request, SamplingPlan, WeightsUpdate
from stages.rl.inbox import Arrival, Inbox
from stages.rl.ledger.reader import read_groups, read_ledger
from stages.rl.ledger.schema import LedgerHeader
from stages.rl.ledger.writer import Ledger
from stages.rl.mini_batch import Sampled
from stages.rl.prompts import PromptStream
from stages.rl.sampling import Sampling, SamplingParts
from stages.rl.scoring import ScoringProcess
from stages.rl.staleness import Admission, StalenessRule
from stages.rl.stopping import StopSignals
from tests.fakes import FakeGenerator
from tests.unit.rl.ledger.recorded_run import make_rows, make_run

HEADER = LedgerHeader(
    max_staleness=0,
    updates_per_rollout=1,
    epochs_per_rollout=1,
    prompts_per_update=2,
    num_updates=3,
    samples_per_prompt=2,
    with_greedy=False,
    weight_update="drain",
    seed=0,
    num_prompts=4,
    prompts_hash="p",
    model_hash="m",
    temperature=1.0,
)


class SlowScoring:
    """An inbox whose groups get their scores when it is told so."""

    is_scoring = True

    def __init__(self, generator: FakeGenerator) -> None:
        self.generator = generator
        self.unscored: list[Sampled] = []
        self.num_scored = 0

    def wait(self, timeout_s: float) -> list[Arrival]:
        events: list[Event] = self.generator.wait(timeout_s)
        self.unscored += [Sampled(item.ticket, item.group) for item in events if isinstance(item, Finished)]
        scored, self.unscored = self.unscored[: self.num_scored], self.unscored[self.num_scored :]
        return [*events, *scored]

    def score(self, sampled: Sampled) -> None:
        self.unscored.append(sampled)


def make_sampling(
    path: Path, make_inbox: type[SlowScoring] = SlowScoring, stall_timeout_s: float = 5
) -> tuple[Sampling, SlowScoring, Ledger]:
    generator, ledger = FakeGenerator(), Ledger.open(path, HEADER)
    inbox = make_inbox(generator)
    parts = SamplingParts(
        generator=generator,
        inbox=cast(Inbox, inbox),
        stream=PromptStream([Request(f"p{number}", (number, 1), seed=number) for number in range(4)], seed=0),
        plan=SamplingPlan(2),
        ledger=ledger,
        stop=StopSignals(),
        stall_timeout_s=stall_timeout_s,
    )
    admission = Admission(StalenessRule(0, 1, 1, prompts_per_update=2), num_places=6, in_order=True)
    return Sampling(parts, admission), inbox, ledger


def test_a_group_that_waits_for_its_score_at_a_checkpoint_is_not_sampled_again_after_a_resume(tmp_path: Path) -> None:
    sampling, inbox, ledger = make_sampling(tmp_path)
    sampling.request()
    inbox.num_scored = 1
    sampling._wait(update=0)  # both are sampled, the last one is scored
    ledger.flush()
    state: dict[str, Any] = sampling.state()

    resumed, later, _ = make_sampling(tmp_path)
    keys = [(int(number), attempt) for number, attempt in state["ready"].items()]
    resumed.restore(state, read_groups(tmp_path, keys), update=0)
    later.num_scored = 2

    assert state["ready"] == {0: 0, 1: 0}
    assert state["waiting"] == {}
    assert later.generator.submitted == []
    assert [item.ticket.number for item in resumed.take(0)] == [0, 1]


class Losing(SlowScoring):
    """An inbox of a generator that loses the same prompt again and again."""

    def wait(self, timeout_s: float) -> list[Arrival]:
        time.sleep(min(timeout_s, 0.02))
        return [Lost(self.generator.submitted[0], "timeout", "")]


def test_losses_without_end_are_no_sign_of_life(tmp_path: Path) -> None:
    sampling, _, _ = make_sampling(tmp_path, Losing, stall_timeout_s=0.1)
    sampling.request()

    with pytest.raises(RunError, match=r"nothing came from the generator or from scoring for rl\.stall_timeout_s=0 "):
        sampling.take(0)


class Lagging(SlowScoring):
    """An inbox of a generator that answers ticket 2 at first by the weights of version 0, whatever is published."""

    def wait(self, timeout_s: float) -> list[Arrival]:
        arrivals = super().wait(timeout_s)
        return [self._age(item) if isinstance(item, Sampled) else item for item in arrivals]

    def _age(self, sampled: Sampled) -> Sampled:
        if (sampled.ticket.number, sampled.ticket.attempt) != (2, 0):
            return sampled
        group = tuple(replace(item, first_policy_version=0, last_policy_version=0) for item in sampled.group)
        return replace(sampled, group=group)


def test_a_group_that_comes_too_old_is_dropped_and_its_prompt_sampled_again(tmp_path: Path) -> None:
    sampling, inbox, ledger = make_sampling(tmp_path, Lagging)
    sampling.request()
    inbox.num_scored = 3
    sampling.take(0)
    sampling.publish(WeightsUpdate(1, tmp_path))
    sampling.request()

    taken = sampling.take(1)

    assert [(item.ticket.number, item.ticket.attempt, item.policy_version) for item in taken] == [(2, 1, 1), (3, 0, 1)]
    assert [(item.number, item.attempt) for item in inbox.generator.submitted[2:]] == [(2, 0), (3, 0), (2, 1)]
    ledger.flush()
    events = [event for event in read_ledger(tmp_path).events if event.kind == "dropped"]
    assert [(event.ticket, event.attempt, event.reason) for event in events] == [(2, 0, "stale")]
    assert sampling.dropped == {"stale": 1}


def test_the_ledger_says_how_many_updates_it_had_when_weights_were_published(tmp_path: Path) -> None:
    sampling, _, ledger = make_sampling(tmp_path)
    sampling.publish(WeightsUpdate(0, tmp_path))
    ledger.add_update(make_rows(0, make_run().groups))
    sampling.publish(WeightsUpdate(1, tmp_path))
    sampling.publish(WeightsUpdate(2, tmp_path))  # too early
    ledger.flush()

    events = read_ledger(tmp_path).events

    assert [(event.policy_version, event.update) for event in events] == [(0, 0), (1, 1), (2, 1)]


class LosingOnce(SlowScoring):
    """An inbox of a generator that loses the first prompt once, and then keeps still."""

    has_lost = False

    def wait(self, timeout_s: float) -> list[Arrival]:
        time.sleep(min(timeout_s, 0.01))
        lost = [] if self.has_lost else [Lost(self.generator.submitted[0], "replica_lost", "")]
        self.has_lost = True
        return [*lost]


def test_after_a_loss_a_checkpoint_asks_for_the_next_attempt(tmp_path: Path) -> None:
    sampling, _, _ = make_sampling(tmp_path, LosingOnce, stall_timeout_s=0.05)
    sampling.request()

    with pytest.raises(RunError, match="nothing came"):
        sampling.take(0)

    assert sampling.state()["waiting"] == {0: 1, 1: 0}


class Broken(FakeGenerator):
    """A generator with a bug."""

    def wait(self, timeout_s: float) -> list[Event]:  # noqa: ARG002  it ends before
        raise ValueError("port out of range")


def test_whatever_ends_the_generator_reaches_the_learner() -> None:
    class Scoring:
        def close(self) -> None:
            pass

    inbox = Inbox(Broken(), lambda *_: cast(ScoringProcess, Scoring()), lambda *_: None)
    with closing(inbox), pytest.raises(ValueError, match="port out of range"):
        inbox.wait(10)
