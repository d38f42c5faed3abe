import pytest

from stages.common.errors import InputError
from stages.data.rows import Row, parse_rows

ROWS = [Row("a.csv, line 2", {"prompt": "Hi"}), Row("a.csv, line 3", {"prompt": " \n"})]


def read_prompt(row: Row) -> str:
    return row.text("prompt")


def test_a_bad_row_stops_the_reading_and_is_named() -> None:
    with pytest.raises(
        InputError,
        match=r"^a\.csv, line 3: column 'prompt' is only white space; expected text "
        r"\(bad rows: 1, data\.task\.max_bad_rows=0\)$",
    ):
        parse_rows(ROWS, read_prompt, max_bad_rows=0)


def test_an_allowed_bad_row_is_dropped_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    assert parse_rows(ROWS, read_prompt, max_bad_rows=1) == (["Hi"], 1)
    assert "problem=a.csv, line 3: column 'prompt' is only white space" in caplog.text


def test_a_row_without_text_counts_as_bad() -> None:
    rows = [*ROWS[:1], Row("a.csv, line 4", {}, problem="a.csv, line 4: column 'prompt' is null; expected text")]

    assert parse_rows(rows, read_prompt, max_bad_rows=1) == (["Hi"], 1)
    with pytest.raises(InputError, match=r"^a\.csv, line 4: column 'prompt' is null; expected text \(bad rows: 1,"):
        parse_rows(rows, read_prompt, max_bad_rows=0)


def test_a_source_of_bad_rows_alone_is_refused_however_many_are_allowed() -> None:
    with pytest.raises(InputError, match="every row is bad"):
        parse_rows(ROWS[1:], read_prompt, max_bad_rows=9)
