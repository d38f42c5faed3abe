import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.common.errors import InputError
from stages.data.files import read_rows

COLUMNS = ("prompt", "completion")
GOOD = '{"prompt": "Hi", "completion": "Hello."}\n'


def test_every_format_reads_the_same_rows_in_the_files_order(tmp_path: Path) -> None:
    records = [{"prompt": "Hi", "completion": "Hello."}, {"prompt": "Zwei,\nZeilen", "completion": "Ça va “gut”."}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "a.json").write_text(json.dumps(records, indent=1))
    (tmp_path / "a.csv").write_text('completion,prompt\nHello.,Hi\nÇa va “gut”.,"Zwei,\nZeilen"\n', encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")

    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet"):
        rows = read_rows(str(tmp_path / name), COLUMNS)
        assert [row.cells for row in rows.rows] == records, name


def test_places_count_lines_from_one_and_skip_blank_ones(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n" + GOOD + "\n" + GOOD.replace("Hi", "Ho"))

    assert [row.place for row in read_rows(str(path), COLUMNS).rows] == [f"{path}, line 2", f"{path}, line 4"]


def test_a_csv_row_after_a_quoted_line_break_is_named_by_its_own_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\n"two\nlines",yes\nHi\n')

    with pytest.raises(InputError, match=r"a\.csv, line 4: has 1 cells; expected 2: 'prompt', 'completion'$"):
        read_rows(str(path), COLUMNS)


def test_equal_rows_are_kept_once_and_counted_even_if_other_columns_differ(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD + GOOD.replace("{", '{"id": 7, ') + GOOD.replace("Hi", "Ho"))

    rows = read_rows(str(path), COLUMNS)

    assert (rows.num_rows, rows.num_duplicates, len(rows.rows)) == (3, 1, 2)


def test_a_byte_order_mark_and_unusual_line_separators_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + '{"prompt": "a\u2028b", "completion": "c"}\r\n'.encode())

    assert read_rows(str(path), COLUMNS).rows[0].cells == {"prompt": "a\u2028b", "completion": "c"}


def test_a_column_that_may_be_missing_reads_null_as_empty(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "Hi", "completion": null}')

    assert read_rows(str(path), COLUMNS, may_be_missing=["completion"]).rows[0].cells["completion"] == ""


BAD_FILES = [
    ("a.jsonl", b"", r"a\.jsonl: holds no rows; expected columns 'prompt', 'completion'$"),
    ("a.json", b"", r"a\.json: holds no rows"),
    ("a.json", b"[]", r"a\.json: holds no rows"),
    ("a.csv", b"", r"a\.csv: holds no rows"),
    ("a.csv", b"prompt,completion\n", r"a\.csv: holds no rows"),
    ("a.jsonl", GOOD.encode() + b'{"prompt": "Hi", \n', r"a\.jsonl, line 2: not JSON at character 18: Expecting"),
    ("a.jsonl", GOOD.encode() + b"[1]\n", r"a\.jsonl, line 2: is a list; expected an object with named columns$"),
    ("a.jsonl", b"[" * 100_000, r"a\.jsonl, line 1: not usable JSON: maximum recursion"),
    ("a.json", b'[\n{"prompt": }]', r"a\.json, line 2: not JSON at character 12: Expecting value$"),
    ("a.json", b'{"prompt": "Hi"}', r"a\.json: holds one object; expected a list of objects$"),
    ("a.json", b'[{"prompt": "a", "completion": "b"}, null]', r"a\.json, row 2: is a null; expected an object"),
    (
        "a.jsonl",
        GOOD.encode() + b'{"prompt": "Hi", "output": "Ho"}',
        r"a\.jsonl, line 2: column 'completion' is missing; columns are 'prompt', 'output'$",
    ),
    ("a.jsonl", b"{}", r"a\.jsonl, line 1: column 'prompt' is missing; columns are none$"),
    (
        "a.csv",
        b"prompt,answer\na,b\n",
        r"a\.csv, line 1: column 'completion' is missing; columns are 'prompt', 'answer'$",
    ),
    ("a.csv", b"prompt,prompt,completion\na,b,c\n", r"a\.csv, line 1: column 'prompt' is there 2 times; expected one$"),
    ("a.csv", b"prompt,completion\na,b\na,b,c\n", r"a\.csv, line 3: has 3 cells; expected 2"),
    ("a.csv", b'prompt,completion\na,"b', r"a\.csv, line 2: not CSV: unexpected end of data$"),
    (
        "a.jsonl",
        GOOD.encode() + b'{"prompt": "caf\xe9"}',
        r"a\.jsonl, line 2: not UTF-8 at byte offset 56 \(0xe9\); save the file as UTF-8$",  # 41 + 15
    ),
    ("a.csv", b"\xff\xfea\x00", r"a\.csv, line 1: not UTF-8 at byte offset 0 \(0xff\)"),
    ("a.parquet", b"PAR0 is not parquet", r"a\.parquet: not a parquet file: "),
    ("a.parquet", b"", r"a\.parquet: not a parquet file: "),
    ("a.txt", b"Hi", r"a\.txt: unsupported extension '\.txt'; allowed are \.jsonl, \.json, \.csv, \.parquet$"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_a_bad_file_is_one_line_that_names_the_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)

    with pytest.raises(InputError, match=message) as caught:
        read_rows(str(tmp_path / name), COLUMNS)

    assert "\n" not in str(caught.value)


BAD_CELLS = [
    (b'{"prompt": "a", "completion": 3}', "column 'completion' is 3 (int); expected text"),
    (b'{"prompt": null, "completion": "b"}', "column 'prompt' is null; expected text"),
    (
        b'{"prompt": ["' + b"a" * 99 + b'"], "completion": "b"}',
        f"column 'prompt' is ['{'a' * 35}... (list); expected text",
    ),
    (
        b'{"prompt": "ab\\ud800", "completion": "b"}',
        "column 'prompt' holds half a surrogate pair at character 3; expected valid Unicode",
    ),
]


@pytest.mark.parametrize(("line", "problem"), BAD_CELLS)
def test_a_row_whose_cell_is_no_text_is_kept_with_its_problem(tmp_path: Path, line: bytes, problem: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([line, GOOD.encode().strip(), line]))

    rows = read_rows(str(path), COLUMNS)

    assert [row.problem for row in rows.rows] == [f"{path}, line 1: {problem}", None, f"{path}, line 3: {problem}"]
    assert rows.num_duplicates == 0


def test_a_cell_of_a_csv_file_may_be_as_long_as_a_document(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"prompt,completion\na,{'b' * 200_000}\n")

    assert len(read_rows(str(tmp_path / "a.csv"), COLUMNS).rows[0].cells["completion"]) == 200_000


def test_a_parquet_column_of_numbers_or_of_another_name_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.table({"prompt": ["a", "b"], "completion": [1, 2]}), path)

    assert read_rows(path, COLUMNS).rows[0].problem == f"{path}, row 1: column 'completion' is 1 (int); expected text"
    with pytest.raises(
        InputError, match=r"a\.parquet: column 'chosen' is missing; columns are 'prompt', 'completion'$"
    ):
        read_rows(path, ("prompt", "chosen"))


def test_a_parquet_file_without_rows_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.table({"prompt": pa.array([], pa.string()), "completion": pa.array([], pa.string())}), path)

    with pytest.raises(InputError, match=r"a\.parquet: holds no rows"):
        read_rows(path, COLUMNS)


def test_a_missing_file_and_a_directory_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "b.json").mkdir()

    with pytest.raises(InputError, match=r"a\.json: not found; paths are relative to the project's folder$"):
        read_rows(str(tmp_path / "a.json"), COLUMNS)
    with pytest.raises(InputError, match=r"b\.json: is a directory, not a file"):
        read_rows(str(tmp_path / "b.json"), COLUMNS)


def test_a_configuration_of_a_data_set_is_chosen_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the library takes a folder of that name before it asks the hub
    folder = tmp_path / "owner/name"
    folder.mkdir(parents=True)
    for config in ("main", "other"):
        (folder / f"{config}.jsonl").write_text(json.dumps({"prompt": config, "completion": "b"}))
    configs = "".join(f"- config_name: {config}\n  data_files: {config}.jsonl\n" for config in ("main", "other"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")

    assert read_rows("hub:owner/name#other", COLUMNS).rows[0].cells["prompt"] == "other"
    with pytest.raises(InputError, match=r"hub:owner/name: cannot be loaded: Config name is missing"):
        read_rows("hub:owner/name", COLUMNS)


@pytest.mark.parametrize("source", ["hub:", "hub:name", "hub:owner/name:", "hub:owner/name:train:test", "hub:a/b/c"])
def test_a_malformed_hub_source_says_what_is_expected(source: str) -> None:
    with pytest.raises(InputError, match=r"not a data set of the hub; expected hub:OWNER/NAME\[#CONFIG\]\[@"):
        read_rows(source, COLUMNS)
