from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.common.errors import InputError
from stages.data.records import Completion
from stages.rl.ledger.reader import read_groups, read_ledger
from stages.rl.ledger.schema import Event, LedgerHeader, TrainedRow
from stages.rl.ledger.writer import Ledger
from tests.unit.rl.ledger.recorded_run import HEADER, make_completion, make_group, make_rows, make_run

FINITE = st.floats(allow_nan=False, allow_infinity=False)


def names(path: Path) -> list[str]:
    return sorted(file.relative_to(path).as_posix() for file in path.rglob("*.parquet"))


def test_what_was_written_is_read_back_exactly(tmp_path: Path) -> None:
    run = make_run()

    ledger = read_ledger(run.write(tmp_path / "ledger"))

    assert ledger.header == HEADER
    assert ledger.groups(run.groups) == {key: tuple(group) for key, group in run.groups.items()}
    assert [list(update.rows) for update in ledger.updates()] == run.updates
    assert list(ledger.events) == run.events


@given(logprobs=st.lists(FINITE, min_size=1, max_size=4), text=st.text(max_size=5), score=FINITE, data=st.data())
@settings(max_examples=25, deadline=None)
def test_any_float_text_and_versions_are_read_back_exactly(
    logprobs: list[float], text: str, score: float, data: st.DataObject
) -> None:
    versions = sorted(data.draw(st.lists(st.integers(0, 3), min_size=len(logprobs), max_size=len(logprobs))))
    completion = Completion(
        *("p", 0, False, (1,), tuple(range(len(logprobs))), tuple(logprobs), text, True, versions[0], versions[-1]),
        token_policy_versions=tuple(versions) if len(set(versions)) > 1 else (),
    )
    row = TrainedRow(0, 0, 0, 0, 0, 0, 0, False, score, 0, 0, 0, 0, score, tuple(logprobs), tuple(logprobs))

    with TemporaryDirectory() as directory:
        path = Path(directory)
        ledger = Ledger.open(path, HEADER)
        ledger.add_group(0, 0, [completion], "replica-0")
        ledger.add_update([row])
        ledger.flush()
        reader = read_ledger(path)
        (update,) = reader.updates()

        assert reader.groups([(0, 0)]) == {(0, 0): (completion,)}
        assert update.rows == (row,)
        assert [value.hex() for value in update.rows[0].reference_logprobs or ()] == [item.hex() for item in logprobs]


def test_a_group_is_read_in_order_however_it_was_written(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path, HEADER)
    group = make_group(3, 0)
    ledger.add_group(3, 0, list(reversed(group)), "replica-0")
    ledger.flush()

    assert read_groups(tmp_path, [(3, 0)]) == {(3, 0): tuple(group)}


def test_groups_come_in_the_order_they_were_asked_for_from_several_segments(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path, HEADER)
    for ticket in range(4):
        ledger.add_group(ticket, 0, make_group(ticket, 0), "replica-0")
        ledger.flush()

    groups = read_groups(tmp_path, [(3, 0), (0, 0), (2, 0)])

    assert list(groups) == [(3, 0), (0, 0), (2, 0)]
    assert [group[0].token_ids[0] for group in groups.values()] == [3, 0, 2]


def test_a_group_that_is_not_recorded_is_named(tmp_path: Path) -> None:
    path = make_run().write(tmp_path)

    with pytest.raises(InputError, match="has no samples of ticket 8 attempt 0"):
        read_groups(path, [(9, 0), (8, 0)])


def test_a_sample_of_two_units_has_two_rows_and_both_units_count(tmp_path: Path) -> None:
    run = make_run()
    again = replace(run.updates[0][0], unit=2, micro_batch=0, place=2)
    run.updates[0].append(again)

    first = next(read_ledger(run.write(tmp_path)).updates())

    assert [row.unit for row in first.rows if row.key == (0, 0) and row.sample_index == 0] == [0, None, 2]
    assert (first.num_units, first.keys) == (3, [(0, 0), (1, 0)])  # row None is the greedy one


def test_updates_can_be_read_without_their_logprobs(tmp_path: Path) -> None:
    path = make_run().write(tmp_path)

    rows = [row for update in read_ledger(path).updates(with_logprobs=False) for row in update.rows]

    assert {row.reference_logprobs for row in rows} == {None}
    assert {row.advantage for row in rows} == {None, 0.1}


def test_samples_show_versions_without_repetitions(tmp_path: Path) -> None:
    path = make_run().write(tmp_path)

    mixed = [sample for sample in read_ledger(path).samples() if len(sample.versions) > 1]

    assert [(sample.key, sample.sample_index, sample.num_tokens, sample.versions) for sample in mixed] == [
        ((7, 0), 1, 3, (2, 3))
    ]


def test_a_flush_writes_one_segment_per_table_that_has_rows(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path, HEADER)

    ledger.add_event(Event("published", 0, policy_version=0))
    first = ledger.flush()
    nothing = ledger.flush()
    ledger.add_group(0, 0, make_group(0, 0), "replica-0")
    ledger.add_event(Event("published", 1, policy_version=1))
    last = ledger.flush()

    assert (first, nothing, last) == (1, 1, 2)
    assert names(tmp_path) == ["events-000000.parquet", "events-000001.parquet", "samples-000001.parquet"]


def test_a_ledger_that_is_opened_again_goes_on_after_its_last_segment(tmp_path: Path) -> None:
    run = make_run()
    run.write(tmp_path)

    ledger = Ledger.open(tmp_path, HEADER)
    ledger.add_event(Event("resumed", 8))

    assert ledger.flush() == 3
    assert list(read_ledger(tmp_path).events) == [*run.events, Event("resumed", 8)]


def test_another_header_is_refused_naming_every_key_that_differs(tmp_path: Path) -> None:
    Ledger.open(tmp_path, HEADER)

    with pytest.raises(InputError) as caught:
        Ledger.open(tmp_path, replace(HEADER, max_staleness=3, model_hash="xyz"))

    assert str(caught.value).endswith(
        "belongs to another run: max_staleness is 7 there and 3 here, model_hash is 'def' there and 'xyz' here"
    )


def test_segments_without_a_header_are_not_taken_over(tmp_path: Path) -> None:
    make_run().write(tmp_path)
    (tmp_path / "ledger.json").unlink()

    with pytest.raises(InputError, match=r"has segments of a ledger but no ledger\.json"):
        Ledger.open(tmp_path, HEADER)


def test_half_written_files_are_ignored_and_removed_when_writing_goes_on(tmp_path: Path) -> None:
    run = make_run()
    path = run.write(tmp_path)
    half = path / ".samples-000002.parquet.staging-123"
    half.write_bytes(b"PAR1 and no more")

    assert list(read_ledger(path).events) == run.events
    Ledger.open(path, HEADER)

    assert not half.exists()


def write_three_segments(path: Path) -> Ledger:
    ledger = Ledger.open(path, HEADER)
    for ticket in range(3):
        ledger.add_group(ticket, 0, make_group(ticket, 0), "replica-0")
        ledger.add_event(Event("published", ticket, policy_version=ticket))
        ledger.flush()
    return ledger


def test_rolling_back_moves_later_segments_aside_and_writing_goes_on_there(tmp_path: Path) -> None:
    write_three_segments(tmp_path)

    ledger = Ledger.open(tmp_path, HEADER)
    ledger.roll_back_to(1)
    ledger.add_event(Event("resumed", 0))
    ledger.flush()

    reader = read_ledger(tmp_path)
    assert [event.kind for event in reader.events] == ["published", "resumed"]
    assert [sample.ticket for sample in reader.samples()] == [0, 0, 0, 0]
    assert reader.num_rolled_back() == {"samples": 8, "updates": 0, "events": 2}  # 2 groups of 4


def test_each_roll_back_has_a_directory_of_its_own(tmp_path: Path) -> None:
    write_three_segments(tmp_path).roll_back_to(2)

    ledger = Ledger.open(tmp_path, HEADER)
    ledger.add_event(Event("resumed", 2))
    ledger.flush()
    ledger.roll_back_to(2)
    ledger.roll_back_to(2)

    assert names(tmp_path / "rolled_back") == [
        "0/events-000002.parquet",
        "0/samples-000002.parquet",
        "1/events-000002.parquet",
    ]


def test_a_roll_back_that_was_killed_half_way_is_finished_by_the_next(tmp_path: Path) -> None:
    write_three_segments(tmp_path)
    moved = tmp_path / "rolled_back" / "0"
    moved.mkdir(parents=True)
    for name in ("samples-000002.parquet", "events-000002.parquet", "samples-000001.parquet"):
        (tmp_path / name).rename(moved / name)

    Ledger.open(tmp_path, HEADER).roll_back_to(1)

    assert names(tmp_path) == [
        "events-000000.parquet",
        "rolled_back/0/events-000002.parquet",
        "rolled_back/0/samples-000001.parquet",
        "rolled_back/0/samples-000002.parquet",
        "rolled_back/1/events-000001.parquet",
        "samples-000000.parquet",
    ]


def test_rolling_back_forgets_rows_that_were_not_flushed(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path, HEADER)
    ledger.add_update(make_rows(0, make_run().groups))

    ledger.roll_back_to(0)

    assert ledger.flush() == 0
    assert ledger.num_updates == 0


def test_the_ledger_counts_the_updates_it_has_after_a_roll_back_too(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path, HEADER)
    for update in range(3):
        ledger.add_update(make_rows(update, make_run().groups))
        ledger.flush()
    resumed = Ledger.open(tmp_path, HEADER)

    resumed.roll_back_to(2)

    assert (ledger.num_updates, resumed.num_updates) == (3, 2)


def test_a_checkpoint_that_counts_on_missing_segments_is_refused(tmp_path: Path) -> None:
    ledger = write_three_segments(tmp_path)

    with pytest.raises(InputError, match="ends before segment 3, but the checkpoint was written with 4 segments"):
        ledger.roll_back_to(4)


def break_header(path: Path) -> None:
    (path / "ledger.json").write_text("{")


def use_another_format(path: Path) -> None:
    (path / "ledger.json").write_text((path / "ledger.json").read_text().replace('"format": 3', '"format": 2'))


def lose_a_key(path: Path) -> None:
    (path / "ledger.json").write_text((path / "ledger.json").read_text().replace('"seed"', '"sead"'))


def cut_a_segment(path: Path) -> None:
    segment = path / "samples-000000.parquet"
    segment.write_bytes(segment.read_bytes()[:-20])


def swap_tables(path: Path) -> None:
    (path / "samples-000000.parquet").replace(path / "updates-000000.parquet")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_header, "ledger.json: "),
        (use_another_format, "format is 2, only 3 can be read"),
        (lose_a_key, "keys are missing or unknown: sead, seed"),
        (cut_a_segment, "samples-000000.parquet: not a readable segment of a ledger: "),
        (swap_tables, "updates-000000.parquet: columns are ticket, attempt, "),
    ],
)
def test_a_broken_ledger_is_refused_in_one_line(tmp_path: Path, damage: object, message: str) -> None:
    path = make_run().write(tmp_path)
    damage(path)  # type: ignore[operator]

    with pytest.raises(InputError) as caught:
        read_ledger(path)

    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_ledger_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: not a ledger: No such file or directory: ledger\.json"):
        read_ledger(tmp_path / "nowhere")


def test_an_unknown_kind_of_event_is_refused(tmp_path: Path) -> None:
    run = make_run()
    run.events.append(Event("forgotten", 8))  # type: ignore[arg-type]

    with pytest.raises(InputError, match="unknown kind of event 'forgotten'"):
        read_ledger(run.write(tmp_path))


def test_the_header_is_the_same_after_json() -> None:
    assert LedgerHeader.from_json(HEADER.to_json()) == HEADER


def test_versions_that_contradict_each_other_are_not_recorded(tmp_path: Path) -> None:
    completion = replace(make_completion(0, 0, 2), token_policy_versions=(1, 2, 2))

    with pytest.raises(AssertionError):
        Ledger.open(tmp_path, HEADER).add_group(0, 0, [completion], "replica-0")
