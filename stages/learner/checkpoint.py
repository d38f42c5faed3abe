"""Checkpoints of a training stage: committed by rename, the last good one always whole."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stages.common.publish import sync_path, sync_tree

CURRENT = "checkpoint"


def commit_checkpoint(workdir: Path, save: Callable[[Path], None], state: dict[str, Any]) -> None:
    """Write a checkpoint beside the last one, then put it in its place.

    A kill leaves the old checkpoint, the new one, or the new one under its temporary name, which `find_checkpoint`
    picks up.
    """
    staged, current, old = workdir / f"{CURRENT}.new", workdir / CURRENT, workdir / f"{CURRENT}.old"
    if _is_complete(staged):  # of a run that was killed amid the renames below
        _put_in_place(staged, current, old)
    for leftover in (staged, old):
        shutil.rmtree(leftover, ignore_errors=True)
    staged.mkdir(parents=True)
    save(staged)
    (staged / "state.json").write_text(json.dumps(state))
    sync_tree(staged)
    (staged / "complete").touch()
    sync_path(staged)
    _put_in_place(staged, current, old)


def find_checkpoint(workdir: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest complete checkpoint and its state, or None."""
    for name in (f"{CURRENT}.new", CURRENT, f"{CURRENT}.old"):
        path = workdir / name
        if _is_complete(path):
            return path, json.loads((path / "state.json").read_text())
    return None


def _put_in_place(staged: Path, current: Path, old: Path) -> None:
    if current.exists():
        shutil.rmtree(old, ignore_errors=True)
        current.rename(old)
    staged.rename(current)
    shutil.rmtree(old, ignore_errors=True)


def _is_complete(path: Path) -> bool:
    return (path / "complete").is_file()
