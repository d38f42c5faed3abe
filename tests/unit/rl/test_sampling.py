"""What a checkpoint says of prompts that are on their way, and what ends the wait for them."""

import time
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import pytest

from stages.common.errors import RunError
from stages.generation.protocol import Event, Finished, Lost, Request, SamplingPlan
from stages.rl.inbox import Arrival, Inbox
from stages.rl.ledger.reader import read_groups
from stages.rl.ledger.schema import LedgerHeader
from stages.rl.ledger.writer import Ledger
from stages.rl.mini_batch import Sampled
from stages.rl.prompts import PromptStream
from stages.rl.sampling import Sampling, SamplingParts
from stages.rl.scoring import ScoringProcess
from stages.rl.staleness import Admission, StalenessRule
from stages.rl.stopping import StopSignals
from tests.fakes import FakeGenerator

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
