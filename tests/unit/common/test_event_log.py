import math
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from stages.common.event_log import EventLog, encode_number, read_events, read_sent, write_sent


def write(path: Path, *steps: int) -> None:
    log = EventLog(path)
    for step in steps:
        log.append("metrics", step=step)
    log.close()


def test_reading_goes_on_where_it_ended(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write(path, 1, 2)
    offset = read_events(path, 0)[-1][1]
    write(path, 3)

    assert [event["step"] for event, _ in read_events(path, offset)] == [3]


def test_a_torn_line_is_left_out_and_does_not_swallow_the_next(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write(path, 1)
    with path.open("a") as file:
        file.write('{"event": "metr')
    assert [event["step"] for event, _ in read_events(path, 0)] == [1]

    write(path, 2)

    assert [event["step"] for event, _ in read_events(path, 0)] == [1, 2]


def test_nothing_is_sent_at_first_and_the_offset_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert read_sent(path)["offset"] == 0

    write_sent(path, {"offset": 12, "run_id": "r"})

    assert read_sent(path) == {"offset": 12, "run_id": "r"}


@given(st.floats())
def test_every_number_survives(value: float) -> None:
    back = float(encode_number(value))

    assert back == value or (math.isnan(back) and math.isnan(value))
