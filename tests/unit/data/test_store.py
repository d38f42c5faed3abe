import hashlib
from pathlib import Path

import pytest

from stages.common.errors import InputError
from stages.data.prepare import PreparedData, SplitData
from stages.data.records import SPLITS, Demonstration, Message, Pair
from stages.data.store import read_demonstrations, read_pairs, read_prompts, write_task_data
from stages.data.tasks.task import make_prompt

PROMPT = make_prompt([Message("system", "Be brief."), Message("user", "Ça va?\nOder “nicht”?")], "g")
DEMONSTRATION = Demonstration(PROMPT, "Ja.\n")
PAIR = Pair(PROMPT, "chosen", " rejected ")


def prepare(pairs: list[Pair] | None) -> PreparedData:
    empty = SplitData([], [], None if pairs is None else [])
    full = SplitData([PROMPT], [DEMONSTRATION], pairs)
    return PreparedData({"train": full, "validation": empty, "heldout": empty}, 1, 0, 0, 0, 0)


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    write_task_data(tmp_path, prepare([PAIR]))

    assert read_prompts(tmp_path, "train") == [PROMPT]
    assert read_demonstrations(tmp_path, "train") == [DEMONSTRATION]
    assert read_pairs(tmp_path, "train") == [PAIR]
    assert (read_prompts(tmp_path, "heldout"), read_pairs(tmp_path, "heldout")) == ([], [])


def test_a_task_without_pairs_reads_as_none(tmp_path: Path) -> None:
    write_task_data(tmp_path, prepare(None))

    assert [read_pairs(tmp_path, split) for split in SPLITS] == [None, None, None]


def test_the_same_data_gives_the_same_bytes(tmp_path: Path) -> None:
    hashes = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_task_data(tmp_path / name, prepare([PAIR]))
        files = sorted((tmp_path / name).iterdir())
        hashes.append([(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files])

    assert hashes[0] == hashes[1]
    assert len(hashes[0]) == 9  # three kinds, three splits


def test_a_missing_file_says_which_command_writes_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"prompts_train\.parquet: not found; run the stage that writes it"):
        read_prompts(tmp_path, "train")
    with pytest.raises(InputError, match=r"pairs_train\.parquet: not found"):
        read_pairs(tmp_path, "train")


def test_a_damaged_or_foreign_file_is_named(tmp_path: Path) -> None:
    write_task_data(tmp_path, prepare([PAIR]))
    (tmp_path / "pairs_train.parquet").write_bytes(b"PAR1")
    (tmp_path / "prompts_train.parquet").rename(tmp_path / "demonstrations_train.parquet")

    with pytest.raises(InputError, match=r"pairs_train\.parquet: cannot be read: "):
        read_pairs(tmp_path, "train")
    with pytest.raises(InputError, match=r"has columns prompt_id, group, messages; expected .*, completion, as text$"):
        read_demonstrations(tmp_path, "train")
