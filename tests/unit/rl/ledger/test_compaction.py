from pathlib import Path

import pytest

from stages.common.errors import InputError
from stages.rl.ledger.checks.run import check_ledger
from stages.rl.ledger.compaction import publish_ledger
from stages.rl.ledger.reader import read_ledger
from stages.rl.ledger.schema import Event
from stages.rl.ledger.writer import Ledger
from tests.unit.rl.ledger.recorded_run import HEADER, make_run


def write_in_small_segments(path: Path) -> None:
    run = make_run()
    ledger = Ledger.open(path, HEADER)
    for key, group in run.groups.items():
        ledger.add_group(*key, group, "replica-0")
        ledger.flush()
    for rows in run.updates:
        ledger.add_update(rows)
        ledger.flush()
    for event in run.events:
        ledger.add_event(event)
    offset = ledger.flush()
    ledger.add_event(Event("resumed", 8))
    ledger.flush()
    ledger.roll_back_to(offset)


def test_a_published_ledger_reads_as_the_one_it_was_made_from(tmp_path: Path) -> None:
    source, target = tmp_path / "work", tmp_path / "out" / "ledger"
    write_in_small_segments(source)

    publish_ledger(source, target)

    assert sorted(path.name for path in target.iterdir()) == [
        "events-000000.parquet",
        "ledger.json",
        "rolled_back",
        "samples-000000.parquet",
        "updates-000000.parquet",
    ]
    before, after = read_ledger(source), read_ledger(target)
    keys = make_run().groups
    assert (after.header, after.events, after.groups(keys)) == (before.header, before.events, before.groups(keys))
    assert list(after.updates()) == list(before.updates())
    assert after.num_rolled_back() == {"samples": 0, "updates": 0, "events": 1}
    assert [result.violations for result in check_ledger(target)] == [()] * 4


def test_publishing_again_replaces_what_is_there(tmp_path: Path) -> None:
    write_in_small_segments(tmp_path / "work")
    Ledger.open(tmp_path / "empty", HEADER)
    publish_ledger(tmp_path / "work", tmp_path / "out")

    publish_ledger(tmp_path / "empty", tmp_path / "out")

    assert [path.name for path in (tmp_path / "out").iterdir()] == ["ledger.json"]


def test_nothing_is_published_of_a_ledger_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a ledger"):
        publish_ledger(tmp_path / "nowhere", tmp_path / "out")

    assert not (tmp_path / "out").exists()
