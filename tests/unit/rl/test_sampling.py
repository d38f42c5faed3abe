"""What a checkpoint says of prompts that are on their way."""

from pathlib import Path
from typing import Any, cast

from stages.generation.protocol import Event, Finished, Request, SamplingPlan
from stages.rl.inbox import Arrival, Inbox
from stages.rl.ledger.reader import read_groups
from stages.rl.ledger.schema import LedgerHeader
from stages.rl.ledger.writer import Ledger
from stages.rl.mini_batch import Sampled
from stages.rl.prompts import PromptStream
from stages.rl.sampling import Sampling, SamplingParts
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


def make_sampling(path: Path) -> tuple[Sampling, SlowScoring, Ledger]:
    generator, ledger = FakeGenerator(), Ledger.open(path, HEADER)
    inbox = SlowScoring(generator)
    parts = SamplingParts(
        generator=generator,
        inbox=cast(Inbox, inbox),
        stream=PromptStream([Request(f"p{number}", (number, 1), seed=number) for number in range(4)], seed=0),
        plan=SamplingPlan(2),
        ledger=ledger,
        stop=StopSignals(),
        stall_timeout_s=5,
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
