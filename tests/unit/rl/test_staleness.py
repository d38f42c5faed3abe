import random
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.rl.staleness import Admission, Outstanding, StalenessRule

RULES = st.builds(
    lambda ahead, n, t, size: StalenessRule(n * t - 1 + ahead, n, t, size),
    st.integers(0, 15),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 4),
)
"""Every bound that can be kept, from synchronous to far ahead."""


@dataclass(frozen=True)
class Faults:
    """Chances of what goes wrong."""

    loses: float = 0.0
    """An attempt is lost on its way."""
    misses_swap: float = 0.0
    """An attempt is sampled by older weights than it was sent off with."""
    discards: float = 0.0
    """A mini-batch holds nothing to learn from."""
    evaluates: float = 0.0
    """Weights are published between rollouts too."""


class SimulatedRun:
    """The learner's loop without models, with a generator that answers in any order and at any speed."""

    def __init__(
        self, rule: StalenessRule, num_rollouts: int, *, in_order: bool, faults: Faults | None = None, seed: int = 0
    ) -> None:
        self.rule = rule
        self.in_order = in_order
        self.num_updates = num_rollouts * rule.cycle
        self.num_places = num_rollouts * rule.prompts_per_rollout
        self.admission = Admission(rule, self.num_places, in_order=in_order)
        self.version = self.published = self.num_stale = 0
        self.taken: list[list[int]] = []
        """Tickets of every mini-batch, the discarded ones too."""
        self.discarded: list[int] = []
        self.trained: list[dict[int, int]] = []
        """Of each update: the version that sampled each ticket."""
        self._faults = faults or Faults()
        # Two sources, so that the generator's luck does not change what the learner decides.
        self._generator, self._learner = random.Random(seed), random.Random("learner")
        self._speed = self._generator.choice([0, 1, 4, 50])
        self._waiting: dict[int, int] = {}
        self._running: dict[int, int] = {}
        self._arrived: dict[int, int] = {}

    def run(self) -> None:
        self._publish()
        while self.version < self.num_updates:
            self.trained.append(self._next_mini_batch())
            for _ in range(self._generator.randint(0, self._speed)):  # while the learner trains
                self._sample()
            self.version += 1
            if self.rule.opens(self.version) or self._learner.random() < self._faults.evaluates:
                self._publish()

    def _publish(self) -> None:
        self.published = self.version
        self._request()

    def _request(self) -> None:
        for ticket in self.admission.admit(self.published):
            self._waiting[ticket] = self.published
        # Rollout r may be sampled by version (r+1)U − 1 − k and newer: as many as that allows, and no more.
        num_rollouts = (self.published + self.rule.max_staleness + 1) // self.rule.cycle
        in_flight = self.admission.num_consumed + len(self.admission.outstanding)
        assert in_flight == min(num_rollouts * self.rule.prompts_per_rollout, self.num_places)

    def _next_mini_batch(self) -> dict[int, int]:
        place = self.version % self.rule.cycle
        if place >= self.rule.updates_per_rollout:
            return self.trained[self.version - self.rule.updates_per_rollout]
        mini_batch = self._take()
        while self._learner.random() < self._faults.discards:
            self.discarded += mini_batch
            self.admission.num_consumed -= len(mini_batch)
            self._request()
            mini_batch = self._take()
        return mini_batch

    def _take(self) -> dict[int, int]:
        while True:
            for ticket in self.admission.find_too_old(self.version):
                self.num_stale += 1
                self._send_again(ticket)
            chosen = self.admission.choose()
            if chosen is not None:
                mini_batch = {ticket: self.admission.outstanding[ticket].version for ticket in chosen}
                self.admission.consume(chosen)
                self.taken.append(chosen)
                return mini_batch
            self._wait()

    def _wait(self) -> None:
        assert self._waiting or self._running or self._arrived, "deadlock: nothing is under way"
        while not self._arrived:
            self._sample()
        for ticket, version in self._arrived.items():
            self.admission.finish(ticket, version)
        self._arrived.clear()

    def _sample(self) -> None:
        """The generator begins, finishes or loses one prompt."""
        if self._waiting and (not self._running or self._generator.random() < 0.5):
            ticket = self._generator.choice(list(self._waiting))
            submitted = self._waiting.pop(ticket)
            # Drained, a prompt is sampled by the weights it was sent off with; in flight, by the newest.
            version = submitted if self.in_order else self.published
            if self._generator.random() < self._faults.misses_swap:
                version = self._generator.randint(0, version)
            self._running[ticket] = version
        elif self._running:
            ticket = self._generator.choice(list(self._running))
            version = self._running.pop(ticket)
            if self._generator.random() < self._faults.loses:
                self._send_again(ticket)
            else:
                self._arrived[ticket] = version

    def _send_again(self, ticket: int) -> None:
        self.admission.reissue(ticket, self.published)
        self._waiting[ticket] = self.published


def check_bound(run: SimulatedRun) -> None:
    """No update, of any epoch, trained on data that was too old, or newer than its weights."""
    assert len(run.trained) == run.num_updates
    for update, mini_batch in enumerate(run.trained):
        assert all(0 <= update - version <= run.rule.max_staleness for version in mini_batch.values())


def check_tickets(run: SimulatedRun) -> None:
    """Every ticket that was sent off was trained once an epoch, or discarded."""
    rule = run.rule
    trained: Counter[tuple[int, int]] = Counter()
    for update, mini_batch in enumerate(run.trained):
        assert len(mini_batch) == rule.prompts_per_update
        epoch = update % rule.cycle // rule.updates_per_rollout
        trained.update((ticket, epoch) for ticket in mini_batch)
    assert set(trained.values()) == {1}
    tickets = {ticket for ticket, _ in trained}
    assert len(tickets) == run.num_places
    assert len(trained) == len(tickets) * rule.epochs_per_rollout
    assert run.admission.outstanding == {}
    assert sorted([*tickets, *run.discarded]) == list(range(run.admission.next_ticket))


def trained_staleness(max_staleness: int, n: int, t: int, num_rollouts: int) -> list[int]:
    """Staleness of each update of a drained run with two groups a mini-batch."""
    run = SimulatedRun(StalenessRule(max_staleness, n, t, prompts_per_update=2), num_rollouts, in_order=True)
    run.run()
    per_update = [{update - version for version in batch.values()} for update, batch in enumerate(run.trained)]
    assert all(len(values) == 1 for values in per_update)
    return [values.pop() for values in per_update]


@pytest.mark.parametrize(
    ("n", "t", "max_staleness", "expected"),
    [
        # Synchronous: the second update of a rollout trains data one update old.
        (2, 1, 1, [0, 1, 0, 1, 0, 1, 0, 1]),
        (1, 2, 1, [0, 1, 0, 1, 0, 1, 0, 1]),
        # One step off: rollouts are sampled by versions 0, 0, 2, 4.
        (2, 1, 3, [0, 1, 2, 3, 2, 3, 2, 3]),
        (1, 2, 3, [0, 1, 2, 3, 2, 3, 2, 3]),
        # One update a rollout, one ahead and two ahead: versions 0, 0, 1, 2, 3 and 0, 0, 0, 1, 2.
        (1, 1, 1, [0, 1, 1, 1, 1]),
        (1, 1, 2, [0, 1, 2, 2, 2]),
        # Between the two: a rollout waits for the version in the middle of the one before: 0, 1, 3, 5.
        (2, 1, 2, [0, 1, 1, 2, 1, 2, 1, 2]),
    ],
)
def test_staleness_of_each_update_is_that_of_the_paper(n: int, t: int, max_staleness: int, expected: list[int]) -> None:
    assert trained_staleness(max_staleness, n, t, len(expected) // (n * t)) == expected


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("t", [1, 2, 3])
def test_synchronous_and_one_step_off_are_the_two_named_bounds(n: int, t: int) -> None:
    cycle = n * t
    rollout = [epoch * n + mini_batch for epoch in range(t) for mini_batch in range(n)]  # j, update by update

    assert trained_staleness(cycle - 1, n, t, 4) == rollout * 4
    assert trained_staleness(2 * cycle - 1, n, t, 4) == rollout + [cycle + j for j in rollout] * 3


@settings(max_examples=500, deadline=None)
@given(
    rule=RULES,
    num_rollouts=st.integers(1, 6),
    in_order=st.booleans(),
    seed=st.integers(0, 2**32),
    loses=st.sampled_from([0.0, 0.1, 0.5]),
    discards=st.sampled_from([0.0, 0.1, 0.5]),
    evaluates=st.sampled_from([0.0, 0.3]),
)
def test_pacing_keeps_the_bound_and_throws_nothing_away(
    rule: StalenessRule,
    num_rollouts: int,
    in_order: bool,
    seed: int,
    loses: float,
    discards: float,
    evaluates: float,
) -> None:
    faults = Faults(loses=loses, discards=discards, evaluates=evaluates)
    run = SimulatedRun(rule, num_rollouts, in_order=in_order, faults=faults, seed=seed)

    run.run()

    assert run.num_stale == 0
    check_bound(run)
    check_tickets(run)


@settings(max_examples=500, deadline=None)
@given(rule=RULES, in_order=st.booleans(), seed=st.integers(0, 2**32), misses_swap=st.sampled_from([0.05, 0.5]))
def test_groups_of_weights_that_were_too_old_are_sampled_again(
    rule: StalenessRule, in_order: bool, seed: int, misses_swap: float
) -> None:
    faults = Faults(loses=0.1, misses_swap=misses_swap, discards=0.1)
    run = SimulatedRun(rule, 6, in_order=in_order, faults=faults, seed=seed)

    run.run()

    check_bound(run)
    check_tickets(run)


@settings(max_examples=500, deadline=None)
@given(rule=RULES, seeds=st.tuples(st.integers(0, 2**32), st.integers(0, 2**32)))
def test_in_order_the_generators_speed_and_order_change_nothing(rule: StalenessRule, seeds: tuple[int, int]) -> None:
    faults = Faults(discards=0.2, evaluates=0.2)
    runs = [SimulatedRun(rule, 5, in_order=True, faults=faults, seed=seed) for seed in seeds]

    for run in runs:
        run.run()

    assert runs[0].trained == runs[1].trained
    taken = [ticket for mini_batch in runs[0].taken for ticket in mini_batch]
    assert taken == list(range(len(taken)))


def test_a_group_that_is_too_old_is_found_sampled_again_and_trained() -> None:
    admission = Admission(StalenessRule(1, 1, 1, prompts_per_update=1), num_places=3, in_order=True)
    assert admission.admit(published=0) == [0, 1]
    for ticket in (0, 1):
        admission.finish(ticket, version=0)
        admission.consume([ticket])
    assert admission.admit(published=1) == [2]
    admission.finish(2, version=0)  # by a replica that does not have version 1

    assert admission.find_too_old(update=1) == []
    assert admission.find_too_old(update=2) == [2]
    admission.reissue(2, published=1)
    assert admission.find_too_old(update=2) == []
    assert admission.choose() is None
    admission.finish(2, version=1)
    assert admission.choose() == [2]


@pytest.mark.parametrize(
    ("max_staleness", "n", "t", "last"),
    [
        (0, 1, 1, 3),
        (4, 1, 1, 7),  # 3 + 4
        (5, 2, 2, 6),  # trained again 2 updates later, and 6 + 2 − 3 = 5
        (5, 1, 3, 6),  # for the third time 2 updates later
    ],
)
def test_data_of_version_3_is_too_old_after_its_last_first_update(
    max_staleness: int, n: int, t: int, last: int
) -> None:
    rule = StalenessRule(max_staleness, n, t, prompts_per_update=1)

    assert not rule.is_too_old(version=3, update=last)
    assert rule.is_too_old(version=3, update=last + 1)


def test_a_server_that_drains_may_have_a_version_waiting_for_each_rollout() -> None:
    def count(max_staleness: int, cycle: int, *, in_flight: bool) -> int:
        return StalenessRule(max_staleness, cycle, 1, 4).count_published(in_flight=in_flight)

    assert [count(number, 1, in_flight=False) for number in (0, 1, 4)] == [3, 3, 6]
    assert count(7, 4, in_flight=False) == 4  # 7 updates are two rollouts
    assert count(16, 1, in_flight=True) == 3


def test_places_follow_the_updates_of_first_epochs() -> None:
    rule = StalenessRule(max_staleness=7, updates_per_rollout=2, epochs_per_rollout=2, prompts_per_update=3)

    # Two mini-batches of three, then two updates on the same again.
    assert [rule.first_update(place) for place in range(13)] == [0, 0, 0, 1, 1, 1, 4, 4, 4, 5, 5, 5, 8]
    # Rollouts end with updates 3, 7, 11, so their samples are of versions 0 (both) and 4 = 11 − 7.
    assert [rule.oldest_version(place) for place in (0, 5, 6, 11, 12, 17, 18)] == [0, 0, 0, 0, 4, 4, 8]
    assert [version for version in range(10) if rule.opens(version)] == [0, 4, 8]


def test_who_finishes_first_overtakes_until_someone_behind_would_be_too_late() -> None:
    admission = Admission(StalenessRule(3, 1, 1, prompts_per_update=1), num_places=9, in_order=False)
    assert admission.admit(published=0) == [0, 1, 2, 3]  # trained by update 3 at the latest

    admission.finish(3, version=0)
    assert admission.choose() == [3]  # 0, 1, 2 follow with updates 1, 2, 3
    admission.consume([3])

    assert admission.admit(published=1) == [4]
    admission.finish(4, version=1)
    assert admission.choose() is None  # with update 1 for it, the last of 0, 1, 2 would have update 4
    admission.finish(2, version=0)
    assert admission.choose() == [2]  # older than 4


def test_within_a_rollout_groups_are_trained_as_they_finish() -> None:
    admission = Admission(StalenessRule(1, 2, 1, prompts_per_update=2), num_places=8, in_order=False)
    assert admission.admit(published=0) == [0, 1, 2, 3]  # updates 0 and 1

    admission.finish(3, version=0)
    assert admission.choose() is None  # half a mini-batch
    admission.finish(1, version=0)
    assert admission.choose() == [1, 3]
    admission.consume([1, 3])
    admission.finish(0, version=0)
    assert admission.choose() is None


def test_in_order_nobody_overtakes() -> None:
    admission = Admission(StalenessRule(9, 1, 1, prompts_per_update=2), num_places=8, in_order=True)
    admission.admit(published=0)

    for ticket in (1, 2, 3):
        admission.finish(ticket, version=0)
    assert admission.choose() is None
    admission.finish(0, version=0)
    assert admission.choose() == [0, 1]


def test_the_learner_does_not_wait_for_groups_that_can_no_longer_be_in_time() -> None:
    admission = Admission(StalenessRule(1, 1, 1, prompts_per_update=1), num_places=9, in_order=False)
    # Two finished groups of version 0 that both must be trained by update 1, the next.
    admission.num_consumed = 1
    admission.outstanding = {1: Outstanding(0, is_ready=True), 2: Outstanding(0, is_ready=True)}

    assert admission.find_too_old(update=1) == []
    assert admission.choose() == [1]
    admission.consume([1])
    assert admission.find_too_old(update=2) == [2]


def test_a_prompt_sent_off_again_may_be_trained_later_than_those_behind_it() -> None:
    admission = Admission(StalenessRule(2, 1, 1, prompts_per_update=1), num_places=9, in_order=False)
    assert admission.admit(published=0) == [0, 1, 2]
    admission.finish(0, version=0)
    admission.consume([0])
    assert admission.admit(published=1) == [3]
    admission.finish(3, version=1)

    assert admission.choose() is None  # 1 and 2 would have updates 2 and 3, which is one too late
    admission.reissue(1, published=1)
    assert admission.choose() == [3]  # 2 may have update 2, and 1 update 3


def test_a_group_that_is_not_finished_is_never_too_old() -> None:
    admission = Admission(StalenessRule(0, 1, 1, prompts_per_update=1), num_places=9, in_order=False)
    admission.outstanding = {0: Outstanding(version=0)}

    assert admission.find_too_old(update=1) == []  # its first token may yet be of newer weights
    admission.finish(0, version=0)
    assert admission.find_too_old(update=1) == [0]


def test_after_a_resume_in_order_still_means_the_order_of_tickets() -> None:
    admission = Admission(StalenessRule(3, 1, 1, prompts_per_update=2), num_places=8, in_order=True)
    # Finished groups are restored first, those to be sampled again after them.
    admission.outstanding = {3: Outstanding(0, is_ready=True), 1: Outstanding(0), 2: Outstanding(0)}

    admission.finish(2, version=0)
    assert admission.choose() is None
    admission.finish(1, version=0)
    assert admission.choose() == [1, 2]
