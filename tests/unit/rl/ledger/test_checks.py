from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from stages.rl.ledger.checks.run import check_ledger, format_results
from stages.rl.ledger.schema import Event
from tests.unit.rl.ledger.recorded_run import RecordedRun, make_group, make_run

Change = Callable[[RecordedRun], object]


def find_violations(run: RecordedRun, path: Path) -> list[str]:
    return [f"{result.name}: {line}" for result in check_ledger(run.write(path)) for line in result.violations]


def test_a_valid_ledger_passes_every_check_with_counts(tmp_path: Path) -> None:
    # 8 updates of 2 groups of 4 samples are 64 rows; version 0 is trained up to update 3, version 2 up to update 7.
    assert format_results(check_ledger(make_run().write(tmp_path))).splitlines() == [
        "bound: 64 trained rows, staleness 0 to 5, bound 7: ok",
        "tickets: 10 issued, 8 trained, 2 discarded, 0 outstanding: ok",
        "versions: 8 updates, newest published version 8, 44 samples: ok",
        "completeness: 11 groups, 8 of them trained, in 16 micro-batches: ok",
    ]


def test_an_empty_ledger_passes(tmp_path: Path) -> None:
    run = make_run()
    run.groups, run.updates, run.events = {}, [], []

    assert find_violations(run, tmp_path) == []


def test_a_sample_of_two_units_passes(tmp_path: Path) -> None:
    run = make_run()
    run.updates[0].append(replace(run.updates[0][0], unit=2, micro_batch=0, place=2))

    assert find_violations(run, tmp_path) == []


@pytest.mark.parametrize("num_updates", [0, 1, 3, 4, 5, 7])
def test_an_unfinished_run_passes_with_its_tickets_outstanding(tmp_path: Path, num_updates: int) -> None:
    run = make_run()
    run.cut(num_updates)

    assert find_violations(run, tmp_path) == []


def test_a_ticket_still_being_sampled_may_leave_a_gap_in_an_unfinished_run(tmp_path: Path) -> None:
    run = make_run()
    run.cut(5)
    del run.groups[9, 0]
    run.groups[10, 0] = make_group(10, 2)

    results = check_ledger(run.write(tmp_path))

    assert [result.violations for result in results] == [()] * 4
    # Updates 0 to 4 train tickets 0 to 3, 6 and 7; 8 and 10 are sampled and wait, 9 left no trace.
    assert results[1].counts == "11 issued, 6 trained, 2 discarded, 3 outstanding"


def test_a_run_that_ends_within_a_rollout_passes(tmp_path: Path) -> None:
    run = make_run()
    run.cut(6)
    run.header = replace(run.header, num_updates=6)

    assert find_violations(run, tmp_path) == []


def lose_ticket_five(run: RecordedRun) -> None:
    run.events = [event for event in run.events if event.ticket != 5]


def train_ticket_zero_in_a_second_mini_batch(run: RecordedRun) -> None:
    for update in (1, 3):
        run.updates[update] = [
            replace(row, ticket=0, attempt=0) if row.ticket == 2 else row for row in run.updates[update]
        ]


def leave_out_a_ticket(run: RecordedRun) -> None:
    for update in (0, 2):
        run.updates[update] = [row for row in run.updates[update] if row.ticket != 1]


def train_another_attempt_in_the_second_epoch(run: RecordedRun) -> None:
    run.updates[6] = [replace(row, attempt=0) if row.key == (6, 1) else row for row in run.updates[6]]


def swap_two_updates(run: RecordedRun) -> None:
    run.updates[1], run.updates[2] = run.updates[2], run.updates[1]


def swap_mini_batches(run: RecordedRun) -> None:
    run.updates[2], run.updates[3] = (
        [replace(row, update=2, staleness=2) for row in run.updates[3]],
        [replace(row, update=3, staleness=3) for row in run.updates[2]],
    )


def give_ticket_one_another_prompt(run: RecordedRun) -> None:
    run.groups[1, 0] = [replace(completion, prompt_id="prompt-0") for completion in run.groups[1, 0]]


def sample_two_prompts_for_a_ticket(run: RecordedRun) -> None:
    run.groups[6, 0] = [replace(completion, prompt_id="prompt-2") for completion in run.groups[6, 0]]


def publish_version_two_twice(run: RecordedRun) -> None:
    run.events.insert(3, Event("published", 2, policy_version=2))


def publish_an_older_version_after_a_resume(run: RecordedRun) -> None:
    index = run.events.index(Event("resumed", 4)) + 1
    run.events.insert(index, Event("published", 4, policy_version=3))


def hide_version_three(run: RecordedRun) -> None:
    run.events = [event for event in run.events if event.policy_version != 3]


def publish_before_the_update(run: RecordedRun) -> None:
    run.events[8] = replace(run.events[8], update=3)


def publish_version_three_late(run: RecordedRun) -> None:
    run.events[3] = replace(run.events[3], update=5)


def sample_with_older_weights_later(run: RecordedRun) -> None:
    run.change_sample((7, 0), 1, last_policy_version=1, token_policy_versions=(2, 2, 1))


def lose_a_sample(run: RecordedRun) -> None:
    del run.groups[2, 0][1]


def repeat_a_sample(run: RecordedRun) -> None:
    run.groups[2, 0].append(run.groups[2, 0][1])


def lose_a_row(run: RecordedRun) -> None:
    del run.updates[3][2]


def repeat_a_row(run: RecordedRun) -> None:
    run.updates[0].append(replace(run.updates[0][0], place=2))


def mark_chosen_and_not(run: RecordedRun) -> None:
    run.updates[0].append(replace(run.updates[0][0], unit=None, micro_batch=None, place=None))


def choose_nothing(run: RecordedRun) -> None:
    run.updates[5] = [replace(row, unit=None, micro_batch=None, place=None) for row in run.updates[5]]


def forget(kind: str) -> Change:
    def change(run: RecordedRun) -> None:
        run.events = [event for event in run.events if event.kind != kind]

    return change


@pytest.mark.parametrize(
    ("change", "violation"),
    [
        (
            lambda run: setattr(run, "header", replace(run.header, max_staleness=4)),
            "bound: update 7: ticket 9 attempt 0 greedy: staleness 5 is outside 0 to 4",
        ),
        (
            lambda run: run.change_row(3, 0, staleness=2),
            "bound: update 3: ticket 2 attempt 0 sample 0: staleness 2 is recorded, but version 0 sampled its first "
            "token",
        ),
        (
            lambda run: run.change_row(0, 0, staleness=-1),
            "bound: update 0: ticket 0 attempt 0 sample 0: staleness -1 is outside 0 to 7",
        ),
        (
            lose_ticket_five,
            "tickets: ticket 5: is lost: the run is finished, but it was neither trained nor discarded",
        ),
        (
            lambda run: run.groups.update({(11, 0): make_group(11, 2)}),
            "tickets: ticket 10: is lost: the run is finished, but it was neither trained nor discarded",
        ),
        (
            train_ticket_zero_in_a_second_mini_batch,
            "tickets: ticket 0: was trained at updates 0, 1, 2, 3 instead of 0, 2",
        ),
        (swap_mini_batches, "tickets: ticket 0: was trained at updates 0, 3 instead of 0, 2"),
        (
            swap_mini_batches,
            "tickets: update 2: is recorded as rollout 0 mini-batch 1 epoch 1, but is rollout 0 mini-batch 0 epoch 1",
        ),
        (leave_out_a_ticket, "tickets: update 2: trained on 1 tickets instead of 2"),
        (
            train_another_attempt_in_the_second_epoch,
            "tickets: ticket 6: attempts 0, 1 were trained; only one may be",
        ),
        (
            lambda run: run.events.append(Event("discarded", 8, ticket=0, attempt=0, reason="no_signal")),
            "tickets: ticket 0: was trained and discarded",
        ),
        (
            lambda run: run.events.append(Event("discarded", 8, ticket=4, attempt=0, reason="no_signal")),
            "tickets: ticket 4: was discarded 2 times",
        ),
        (give_ticket_one_another_prompt, "tickets: pass 0: prompt prompt-0 has 2 tickets"),
        (sample_two_prompts_for_a_ticket, "tickets: ticket 6: has samples of 2 prompts: prompt-1, prompt-2"),
        (swap_two_updates, "versions: update 2: is recorded where update 1 should be"),
        (lambda run: run.updates.pop(3), "versions: update 4: is recorded where update 3 should be"),
        (
            lambda run: setattr(run, "header", replace(run.header, num_updates=6)),
            "versions: 8 updates were made, but the run has 6",
        ),
        (publish_version_two_twice, "versions: version 2: was published after version 2"),
        (publish_an_older_version_after_a_resume, "versions: version 3: was published after version 4"),
        (publish_before_the_update, "versions: version 4: was published before update 3 was made"),
        (
            hide_version_three,
            "versions: ticket 7 attempt 0 sample 1: was sampled by versions that were not published: 3",
        ),
        (
            publish_version_three_late,
            "versions: update 4: ticket 7 attempt 0 sample 1: has tokens of version 3, which was published later",
        ),
        (sample_with_older_weights_later, "versions: ticket 7 attempt 0 sample 1: token versions go back: 2, 1"),
        (
            lambda run: run.groups.pop((2, 0)),
            "completeness: update 1: ticket 2 attempt 0: sample 0, sample 1, sample 2, greedy was trained, but is not "
            "among the samples",
        ),
        (
            lose_a_sample,
            "completeness: ticket 2 attempt 0: has sample 0, sample 2, greedy instead of sample 0, sample 1, sample 2, "
            "greedy",
        ),
        (repeat_a_sample, "completeness: ticket 2 attempt 0 sample 1: is recorded 2 times"),
        (
            lose_a_row,
            "completeness: update 3: ticket 2 attempt 0: sample 2 of the group is not part of the update",
        ),
        (repeat_a_row, "completeness: update 0: ticket 0 attempt 0 sample 0 is in unit 0 2 times"),
        (
            mark_chosen_and_not,
            "completeness: update 0: ticket 0 attempt 0 sample 0 is recorded as chosen and as not chosen",
        ),
        (choose_nothing, "completeness: update 5: no sample was chosen for the loss"),
        (
            lambda run: run.change_row(0, 1, micro_batch=1, place=2),
            "completeness: update 0: unit 0 lies in 2 micro-batches",
        ),
        (
            lambda run: run.change_row(0, 1, place=2),
            "completeness: update 0: places of micro-batch 0 are numbered 0, 2 instead of 0 to 1",
        ),
        (
            lambda run: [run.change_row(6, row, micro_batch=2) for row in (4, 5)],
            "completeness: update 6: micro-batches are numbered 0, 2 instead of 0 to 1",
        ),
        (
            lambda run: [run.change_row(6, row, unit=3) for row in (4, 5)],
            "completeness: update 6: units are numbered 0, 3 instead of 0 to 1",
        ),
        (
            lambda run: run.change_row(6, 0, place=None),
            "completeness: update 6: ticket 6 attempt 1 sample 0 has only a part of its place",
        ),
        (
            forget("lost"),
            "completeness: ticket 8 attempt 0: was neither lost nor dropped, but attempt 1 followed",
        ),
        (
            forget("dropped"),
            "completeness: ticket 6 attempt 0: was neither lost nor dropped, but attempt 1 followed",
        ),
        (
            lambda run: run.events.append(Event("dropped", 8, ticket=9, attempt=0, reason="stale")),
            "completeness: ticket 9 attempt 0: was trained, but is recorded as dropped",
        ),
    ],
)
def test_a_violation_is_found(tmp_path: Path, change: Change, violation: str) -> None:
    run = make_run()
    change(run)

    assert violation in find_violations(run, tmp_path)


@pytest.mark.parametrize(
    ("change", "num_violations"),
    [
        (lose_ticket_five, 1),
        (give_ticket_one_another_prompt, 1),
        (publish_version_two_twice, 1),
        (repeat_a_sample, 1),
        (swap_two_updates, 3),  # three updates stand where another should
        (lose_a_row, 1),
    ],
)
def test_one_fault_does_not_hide_in_a_crowd(tmp_path: Path, change: Change, num_violations: int) -> None:
    run = make_run()
    change(run)

    assert len(find_violations(run, tmp_path)) == num_violations


def test_twenty_violations_are_shown_and_the_rest_counted(tmp_path: Path) -> None:
    run = make_run()
    run.header = replace(run.header, max_staleness=2)  # updates 3, 5, 6 and 7, of 8 rows each, are beyond it

    lines = format_results(check_ledger(run.write(tmp_path))).splitlines()

    assert len(lines) == 21
    assert lines[-1] == "and 12 more violations"
