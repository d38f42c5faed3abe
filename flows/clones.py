"""Clones of the repository that share the checkout's DVC cache: a run's own (workspace.py), a recipe's (recipe.py)."""

import fcntl
import logging
import os
import time
from pathlib import Path
from typing import IO

from flows.commands import git
from stages.common.errors import RunError, SettingError
from stages.common.publish import remove_path

CHECKOUT_VARIABLE = "SLIPSTREAM_CHECKOUT"
"""The worker's checkout, if it is not the one that holds this code."""
LOCK_POLL_S = 1.0
BASE = Path(".slipstream/base")
"""Holds the commit that the clone was made from."""

logger = logging.getLogger(__name__)


def find_checkout() -> Path:
    """The checkout that this worker was started in."""
    return Path(os.environ.get(CHECKOUT_VARIABLE) or Path(__file__).parents[1])


def list_changes(checkout: Path) -> list[str]:
    """Files that a clone would have otherwise: changed ones, and new ones among code and inputs. Not dvc.lock."""
    lines = git(checkout, "status", "--porcelain", "--untracked-files=all").splitlines()
    changed = [line[3:] for line in lines if not line.startswith("??")]
    new = [line[3:] for line in lines if line.startswith("?? ")]
    watched = ("stages/", "flows/", "inputs/", "recipes/")
    return [name for name in [*changed, *(name for name in new if name.startswith(watched))] if name != "dvc.lock"]


def wait_for_lock(lock: IO[str], path: Path) -> None:
    """Wait until no other process works in a clone: a run taken for lost may still be alive."""
    is_told = False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not is_told:
                logger.warning("%s: another process works on this run; waiting for it to end", path)
            is_told = True
            time.sleep(LOCK_POLL_S)
        else:
            return


def make_clone(path: Path, repository: str, revision: str) -> None:
    """Clone a repository at a commit, with the checkout's DVC cache.

    Args:
        path: the clone's folder, which must not exist; it appears whole.
        repository: git address.
        revision: a commit of it.

    Raises:
        RunError: git cannot clone it.
        SettingError: the repository has no such commit.
    """
    staged = path.with_name(f"{path.name}.part")
    remove_path(staged)
    git(path.parent, "clone", "--quiet", "--no-checkout", repository, str(staged))
    try:
        git(staged, "cat-file", "-e", f"{revision}^{{commit}}")
    except RunError as error:
        raise SettingError(f"revision={revision!r}: {repository} has no such commit; push it first") from error
    git(staged, "checkout", "--quiet", "--detach", revision)
    _share_dvc(staged)
    (staged / BASE).parent.mkdir(exist_ok=True)
    (staged / BASE).write_text(git(staged, "rev-parse", "HEAD"), encoding="utf-8")
    staged.rename(path)


def _share_dvc(clone: Path) -> None:
    """The checkout's cache and its own settings of remotes; credentials are in the environment, not in files."""
    from dvc.config import Config

    checkout = find_checkout()
    ours = Config(dvc_dir=str(checkout / ".dvc"), validate=True)
    with Config(dvc_dir=str(clone / ".dvc")).edit("local") as settings:
        settings.update(ours.load_one("local"))
        settings.setdefault("cache", {}).setdefault("dir", str((checkout / ".dvc" / "cache").resolve()))
        # Else DVC says after every stage in Prefect's log which `git add` to call; the run commits by itself.
        settings.setdefault("core", {}).setdefault("autostage", True)
