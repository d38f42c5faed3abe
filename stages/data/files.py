"""Read a user's file or hub data set as rows of text; every problem is one line naming its place.

The readers of pyarrow and datasets stop at a bad line with a stack of exceptions that name neither
line nor column. JSON and CSV are therefore read here, parquet and the hub through `datasets`; all
of them go through the same checks of columns and cells.
"""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from stages.common.errors import InputError
from stages.common.watched import warn_unless_watched
from stages.data.rows import Row, Rows

Record = tuple[str, Mapping[str, object]]
"""The place of a row (`line 3`) and its cells, not yet checked."""

LONGEST_CELL = 2**31 - 1
"""Characters of a CSV file's cell. The library stops at 131,072, which a document can have."""

WATCHED = Path("inputs/data")
"""The folder whose changes DVC sees."""

HUB = re.compile(
    r"hub:(?P<name>[\w.-]+/[\w.-]+)(#(?P<config>[\w.-]+))?(@(?P<revision>[\w./-]+))?(:(?P<split>[\w.\[\]%-]+))?"
)


def read_rows(source: str, columns: Sequence[str], *, may_be_missing: Sequence[str] = ()) -> Rows:
    """Read the named columns; rows equal in all of them count as duplicates and are kept once.

    Args:
        source: path of a .jsonl, .json, .csv or .parquet file, or `hub:OWNER/NAME[#CONFIG][@REVISION][:SPLIT]`
            for a data set of the Hugging Face hub (split `train` unless named).
        columns: columns to keep; each must be there. A row whose cell is no text is kept with that problem.
        may_be_missing: those of them whose cells may be null, which reads as empty text.

    Raises:
        InputError: one line naming source, line or row, column, what was found and what is allowed.
    """
    if not HUB.fullmatch(source):
        warn_unless_watched(Path(source), WATCHED)
    rows: dict[tuple[str, ...], Row] = {}
    num_rows = 0
    for place, record in _read_records(source, columns):
        num_rows += 1
        row = _read_row(record, columns, f"{source}, {place}", may_be_missing)
        key = tuple(row.cells.values()) if row.problem is None else (row.place,)
        rows.setdefault(key, row)
    if not rows:
        raise InputError(f"{source}: holds no rows; expected columns {_quote(columns)}")
    return Rows(tuple(rows.values()), num_rows)


def _read_row(record: Mapping[str, object], columns: Sequence[str], place: str, may_be_missing: Sequence[str]) -> Row:
    for column in columns:
        if column not in record:
            raise _missing_column(place, column, record)
    try:
        cells = {column: _read_cell(record[column], column, place, may_be_missing) for column in columns}
    except InputError as error:
        return Row(place, {}, problem=str(error))
    return Row(place, cells)


def _read_cell(cell: object, column: str, place: str, may_be_missing: Sequence[str]) -> str:
    if cell is None and column in may_be_missing:
        return ""
    if not isinstance(cell, str):
        found = "null" if cell is None else f"{_shorten(cell)} ({type(cell).__name__})"
        raise InputError(f"{place}: column {column!r} is {found}; expected text")
    if not cell.isascii():
        _check_unicode(cell, column, place)
    return cell


def _check_unicode(cell: str, column: str, place: str) -> None:
    """JSON can spell half a surrogate pair, which no tokenizer and no UTF-8 file can hold."""
    try:
        cell.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{place}: column {column!r} holds half a surrogate pair at character {error.start + 1}; "
            "expected valid Unicode"
        ) from error


def _read_records(source: str, columns: Sequence[str]) -> Iterable[Record]:
    if source.startswith("hub:"):
        return _read_hub(source, columns)
    path = Path(source)
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    if path.suffix.lower() not in readers:
        raise InputError(f"{path}: unsupported extension {path.suffix!r}; allowed are {', '.join(readers)}")
    if not path.is_file():
        found = "is a directory, not a file" if path.is_dir() else "not found"
        raise InputError(f"{path}: {found}; paths are relative to the project's folder")
    try:
        return readers[path.suffix.lower()](path, columns)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


def _read_text(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")  # a byte order mark is no part of the first column's name
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}, line {line}: not UTF-8 at byte offset {error.start} (0x{content[error.start]:02x}); "
            "save the file as UTF-8"
        ) from error


def _read_jsonl(path: Path, _: Sequence[str]) -> Iterator[Record]:
    # Not str.splitlines: it also cuts at characters that JSON allows inside a string (U+2028).
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line.strip():
            value = _parse_json(line, path, f"line {number}", first_line=number)
            yield f"line {number}", _require_object(value, path, f"line {number}")


def _read_json(path: Path, _: Sequence[str]) -> Iterator[Record]:
    text = _read_text(path)
    if not text.strip():
        return
    rows = _parse_json(text, path, "line 1", first_line=1)
    if not isinstance(rows, list):
        raise InputError(f"{path}: holds one {_json_type(rows)}; expected a list of objects")
    for number, value in enumerate(rows, start=1):
        yield f"row {number}", _require_object(value, path, f"row {number}")


def _parse_json(text: str, path: Path, place: str, *, first_line: int) -> object:
    try:
        value: object = json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise InputError(f"{path}, line {line}: not JSON at character {error.colno}: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, lists 1,000 deep
        raise InputError(f"{path}, {place}: not usable JSON: {error}") from error
    return value


def _require_object(value: object, path: Path, place: str) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise InputError(f"{path}, {place}: is a {_json_type(value)}; expected an object with named columns")
    return value


def _json_type(value: object) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def _read_csv(path: Path, columns: Sequence[str]) -> Iterator[Record]:
    csv.field_size_limit(LONGEST_CELL)
    # newline="": a line end inside quotes belongs to the cell.
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    try:
        header = next(reader, None)
        if header is None:
            return
        _check_header(header, columns, f"{path}, line 1")
        first_line = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(header):
                wanted = f"{len(header)}: {_quote(header)}"
                raise InputError(f"{path}, line {first_line}: has {len(cells)} cells; expected {wanted}")
            if cells:
                yield f"line {first_line}", dict(zip(header, cells, strict=True))
            first_line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not CSV: {error}") from error


def _read_parquet(path: Path, columns: Sequence[str]) -> Iterator[Record]:
    import datasets
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a parquet file: {_first_line(error)}") from error
    _check_header(table.column_names, columns, str(path))
    return _number_rows(datasets.Dataset(table.select(list(columns))))


def _read_hub(source: str, columns: Sequence[str]) -> Iterator[Record]:
    import datasets

    match = HUB.fullmatch(source)
    if match is None:
        raise InputError(f"{source}: not a data set of the hub; expected hub:OWNER/NAME[#CONFIG][@REVISION][:SPLIT]")
    try:
        rows = datasets.load_dataset(
            match["name"], match["config"], revision=match["revision"], split=match["split"] or "train"
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"{source}: cannot be loaded: {_first_line(error)}") from error
    _check_header(rows.column_names, columns, source)
    return _number_rows(rows.select_columns(list(columns)))


def _number_rows(rows: Iterable[Mapping[str, object]]) -> Iterator[Record]:
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", row


def _check_header(header: Sequence[str], columns: Sequence[str], place: str) -> None:
    for column in columns:
        if column not in header:
            raise _missing_column(place, column, header)
        if list(header).count(column) > 1:
            raise InputError(f"{place}: column {column!r} is there {list(header).count(column)} times; expected one")


def _missing_column(place: str, column: str, present: Iterable[str]) -> InputError:
    return InputError(f"{place}: column {column!r} is missing; columns are {_quote(present) or 'none'}")


def _quote(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
