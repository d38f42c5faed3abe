"""A checkpoint is the newest whole one, at whatever instant the last run was killed."""

import json
from pathlib import Path

import pytest

from stages.learner.checkpoint import commit_checkpoint, find_checkpoint


class KilledError(Exception):
    """Stands for a kill between two of the file system's operations."""


def write(folder: Path) -> None:
    (folder / "weights").write_text("w")


def find_number(workdir: Path) -> int | None:
    found = find_checkpoint(workdir)
    if found is None:
        return None
    assert (found[0] / "weights").read_text() == "w"
    assert json.loads((found[0] / "state.json").read_text()) == found[1]
    return int(found[1]["number"])


@pytest.mark.parametrize("num_renames", [0, 1, 2])
def test_the_newest_whole_checkpoint_survives_two_kills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_renames: int
) -> None:
    commit_checkpoint(tmp_path, write, {"number": 1})
    renamed, rename = [], Path.rename

    def rename_some(path: Path, target: Path) -> Path:
        if len(renamed) == num_renames:
            raise KilledError
        renamed.append(path)
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", rename_some)
        if num_renames < 2:
            with pytest.raises(KilledError):
                commit_checkpoint(tmp_path, write, {"number": 2})
        else:
            commit_checkpoint(tmp_path, write, {"number": 2})
    assert find_number(tmp_path) == 2

    def fail(_: Path) -> None:
        raise KilledError

    with pytest.raises(KilledError):
        commit_checkpoint(tmp_path, fail, {"number": 3})
    assert find_number(tmp_path) == 2
    commit_checkpoint(tmp_path, write, {"number": 4})
    assert find_number(tmp_path) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


def test_without_a_whole_one_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.new").mkdir()

    assert find_checkpoint(tmp_path) is None
