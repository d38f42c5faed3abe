"""The data artifact: one parquet file per split and kind, the same bytes for the same data; and the rule, if any."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.common.errors import InputError
from stages.data.records import Demonstration, Message, Pair, Prompt, Split
from stages.data.rules import write_rule

if TYPE_CHECKING:
    import pyarrow

    from stages.data.prepare import PreparedData


def write_task_data(directory: Path, prepared: "PreparedData") -> None:
    """Write `prompts_`, `demonstrations_` and, if the task has them, `pairs_` of every split and the rule."""
    for split, data in prepared.splits.items():
        prompts = [_prompt_row(prompt) for prompt in data.prompts]
        _write(directory / f"prompts_{split}.parquet", prompts, ())
        demonstrations = [{**_prompt_row(item.prompt), "completion": item.completion} for item in data.demonstrations]
        _write(directory / f"demonstrations_{split}.parquet", demonstrations, ("completion",))
        if data.pairs is not None:
            write_pairs(directory, split, data.pairs)
    if prepared.answers is not None:
        write_rule(directory, prepared.answers)


def write_pairs(directory: Path, split: Split, pairs: list[Pair]) -> None:
    """Write the pairs of one split."""
    rows = [{**_prompt_row(pair.prompt), "chosen": pair.chosen, "rejected": pair.rejected} for pair in pairs]
    _write(directory / f"pairs_{split}.parquet", rows, ("chosen", "rejected"))


def read_prompts(directory: Path, split: Split) -> list[Prompt]:
    """The prompts of one split.

    Raises:
        InputError: the file is missing or is not what `write_task_data` writes.
    """
    return [_prompt(row) for row in _read(directory / f"prompts_{split}.parquet", ())]


def read_demonstrations(directory: Path, split: Split) -> list[Demonstration]:
    """The demonstrations of one split.

    Raises:
        InputError: the file is missing or is not what `write_task_data` writes.
    """
    rows = _read(directory / f"demonstrations_{split}.parquet", ("completion",))
    return [Demonstration(_prompt(row), row["completion"]) for row in rows]


def read_pairs(directory: Path, split: Split) -> list[Pair] | None:
    """The pairs of one split; None if the directory holds data of a task without pairs.

    Raises:
        InputError: the directory holds no data, or the file is not what `write_pairs` writes.
    """
    path = directory / f"pairs_{split}.parquet"
    if not path.exists() and any(directory.glob("prompts_*.parquet")):
        return None
    return [Pair(_prompt(row), row["chosen"], row["rejected"]) for row in _read(path, ("chosen", "rejected"))]


def _prompt_row(prompt: Prompt) -> dict[str, Any]:
    messages = [{"role": message.role, "content": message.content} for message in prompt.messages]
    return {"prompt_id": prompt.prompt_id, "group": prompt.group, "messages": messages}


def _prompt(row: dict[str, Any]) -> Prompt:
    messages = tuple(Message(message["role"], message["content"]) for message in row["messages"])
    return Prompt(row["prompt_id"], messages, row["group"])


def _schema(texts: tuple[str, ...]) -> "pyarrow.Schema":
    """Stated, not inferred: an empty split would otherwise have columns of no type."""
    import pyarrow as pa

    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    fields = [("prompt_id", pa.string()), ("group", pa.string()), ("messages", pa.list_(message))]
    return pa.schema([*fields, *((text, pa.string()) for text in texts)])


def _write(path: Path, rows: list[dict[str, Any]], texts: tuple[str, ...]) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.Table.from_pylist(rows, schema=_schema(texts)), path)


def _read(path: Path, texts: tuple[str, ...]) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: not found; run the stage that writes it (dvc repro)") from error
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error
    if not table.schema.equals(_schema(texts)):
        columns = ", ".join(_schema(texts).names)
        raise InputError(f"{path}: has columns {', '.join(table.column_names)}; expected {columns}, as text")
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows
