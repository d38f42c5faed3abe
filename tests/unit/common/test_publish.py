import contextlib
import errno
import json
import os
from pathlib import Path

import pytest

from stages.common.publish import publish_directory, recover_directory, staging_directory, write_json


def make(directory: Path, text: str) -> Path:
    directory.mkdir()
    (directory / "weights").write_text(text)
    return directory


def test_a_published_directory_replaces_the_earlier_one(tmp_path: Path) -> None:
    target = make(tmp_path / "policy", "old")

    with staging_directory(target) as staged:
        (staged / "weights").write_text("new")
        assert (target / "weights").read_text() == "old"

    assert (target / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


def test_a_failure_leaves_the_earlier_directory_and_nothing_else(tmp_path: Path) -> None:
    target = make(tmp_path / "policy", "old")

    with contextlib.suppress(OSError), staging_directory(target) as staged:
        (staged / "weights").write_text("half")
        raise OSError(errno.ENOSPC, "full")

    assert (target / "weights").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


def test_a_kill_between_the_two_renames_is_undone(tmp_path: Path) -> None:
    target = make(tmp_path / "policy", "old")
    target.rename(tmp_path / ".policy.previous")

    recover_directory(target)

    assert (target / "weights").read_text() == "old"


def test_a_kill_after_both_renames_keeps_the_new_directory(tmp_path: Path) -> None:
    target = make(tmp_path / "policy", "new")
    make(tmp_path / ".policy.previous", "old")

    recover_directory(target)

    assert (target / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


def test_a_failing_rename_brings_the_earlier_directory_back(tmp_path: Path) -> None:
    target = make(tmp_path / "policy", "old")

    with pytest.raises(FileNotFoundError):
        publish_directory(tmp_path / "never-written", target)

    assert (target / "weights").read_text() == "old"


def test_what_killed_processes_staged_is_removed_and_what_live_ones_stage_is_kept(tmp_path: Path) -> None:
    make(tmp_path / ".policy.staging-999999999", "of a dead process")
    live = make(tmp_path / f".policy.staging-{os.getppid()}", "of a live process")

    with staging_directory(tmp_path / "policy"):
        pass

    assert sorted(path.name for path in tmp_path.iterdir()) == [live.name, "policy"]


def test_json_holds_null_where_a_number_is_not_finite(tmp_path: Path) -> None:
    write_json(tmp_path / "new" / "metrics.json", {"kl": float("nan"), "interval": [0.5, float("inf")]})

    assert json.loads((tmp_path / "new" / "metrics.json").read_text()) == {"kl": None, "interval": [0.5, None]}


def test_a_file_that_cannot_be_written_keeps_its_earlier_text(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    write_json(path, {"loss": 1})

    with pytest.raises(TypeError):
        write_json(path, {"loss": object()})

    assert json.loads(path.read_text()) == {"loss": 1}
    assert list(tmp_path.iterdir()) == [path]
