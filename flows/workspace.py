"""A run's own clone of the repository: nobody's later edit reaches into it, and two runs share no file.

The clone lies in `.slipstream/runs/KEY` of the worker's checkout and uses its DVC cache. What a run is made of, its
params.yaml and dvc.lock, are commits on branch `runs/KEY`, which is pushed after every stage. A worker on another
machine takes the branch up from there; a retry finds its half-trained checkpoints in the same clone.
"""

import fcntl
import io
import logging
import re
import subprocess
import sys
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect.client.schemas.objects import FlowRun
from ruamel.yaml import YAML

from flows.clones import BASE, find_checkout, list_changes, make_clone, wait_for_lock
from flows.commands import git, run_dvc
from flows.parameters import apply_settings
from stages.common.entry import EXIT_SETTING
from stages.common.errors import RunError, SettingError
from stages.common.event_log import TRACKING, unsent_logs
from stages.common.pipeline import read_yaml
from stages.common.publish import remove_path, write_text

KEEP_RUNS = 10
"""Clones of finished runs that are kept, newest first."""
_FINISHED = Path(".slipstream/finished")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Workspace:
    """A clone that a run works in."""

    path: Path
    key: str

    @property
    def branch(self) -> str:
        """Where the run's settings and dvc.lock are pushed."""
        return f"runs/{self.key}"

    @property
    def commit(self) -> str:
        """Of the run so far."""
        return git(self.path, "rev-parse", "HEAD")

    def save(self, message: str) -> None:
        """Commit what changed of params.yaml and dvc.lock, and push the branch.

        Raises:
            RunError: the repository refuses it; another run may have pushed to the branch.
        """
        names = [name for name in ("params.yaml", "dvc.lock") if (self.path / name).exists()]
        git(self.path, "add", "--", *names)
        if git(self.path, "diff", "--cached", "--name-only"):
            git(self.path, "commit", "--quiet", "--no-verify", "-m", message)
        git(self.path, "push", "--quiet", "origin", f"HEAD:refs/heads/{self.branch}")

    def catch_up(self) -> None:
        """Take up what other workers have pushed, unless this clone is already past it."""
        git(self.path, "fetch", "--quiet", "origin", "+refs/heads/*:refs/remotes/origin/*")
        if not self.has_branch:
            return
        tip = git(self.path, "rev-parse", f"refs/remotes/origin/{self.branch}")
        if git(self.path, "rev-list", "--max-count=1", tip, "^HEAD"):
            git(self.path, "reset", "--quiet", "--hard", tip)

    @property
    def has_branch(self) -> bool:
        """Whether the repository had the run's branch when it was last looked at."""
        return bool(git(self.path, "for-each-ref", f"refs/remotes/origin/{self.branch}"))

    def restore_inputs(self, *, pull: bool) -> None:
        """Files under inputs/ that `dvc add` took out of git, from the shared cache or, with `pull`, from the remote.

        DVC itself restores nothing that a stage only reads as part of a folder.

        Raises:
            RunError: the cache or the remote lacks one.
        """
        added = sorted(str(path.relative_to(self.path)) for path in (self.path / "inputs").rglob("*.dvc"))
        if added:
            run_dvc(self.path, "pull" if pull else "checkout", "--force", *added)

    def needs(self, stage: str) -> bool:
        """Whether DVC would run a stage; one that its run cache has counts as one."""
        return "Running stage" in run_dvc(self.path, "repro", "--dry", "--allow-missing", "--single-item", stage)

    def finish(self) -> None:
        """Mark the clone as one that may be deleted."""
        (self.path / _FINISHED).parent.mkdir(exist_ok=True)
        (self.path / _FINISHED).touch()


def name_run(run: FlowRun) -> str:
    """What names a run everywhere: its branch, its clone, its pipeline in MLflow. The same for a retry."""
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', run.name).strip('-')}-{str(run.id)[:8]}"


@contextmanager
def open_workspace(key: str, repository: str, revision: str, *, name: str | None = None) -> Iterator[Workspace]:
    """The run's clone, made if it is not there, brought up to what other workers have pushed; held by us alone.

    Args:
        key: of the run; the same for a retry and on every machine.
        repository: git address.
        revision: commit the run starts from, used if the run has no branch yet.
        name: of the clone's folder; None is the key. A second clone of a run on one machine needs its own.

    Raises:
        RunError: git cannot clone it.
    """
    runs = find_checkout() / ".slipstream" / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    name = name or key
    with (runs / f"{name}.lock").open("a") as lock:
        wait_for_lock(lock, runs / name)
        workspace = Workspace(runs / name, key)
        (workspace.path / _FINISHED).unlink(missing_ok=True)
        if not workspace.path.exists():
            _prune(runs)
            make_clone(workspace.path, repository, revision)
        workspace.catch_up()
        yield workspace


def prepare_settings(workspace: Workspace, recipe: str | None, overrides: Mapping[str, Any]) -> None:
    """Write the run's settings, check all of them, and commit them; a run that has its branch keeps what it has.

    Raises:
        SettingError: a setting is wrong; one line for each.
    """
    if workspace.has_branch:
        return
    apply_settings(workspace.path, recipe, dict(overrides))
    check_settings(workspace.path)
    workspace.save(f"run {workspace.key}: settings")


def check_settings(folder: Path) -> None:
    """Check all sections of a folder's params.yaml with that folder's own code.

    Raises:
        SettingError: one line per problem.
    """
    done = subprocess.run([sys.executable, "-m", "stages.check_params"], cwd=folder, capture_output=True, text=True)
    if done.returncode == EXIT_SETTING:
        raise SettingError(done.stderr.strip())
    if done.returncode:
        raise RunError(f"{folder}: stages.check_params failed: {done.stderr.strip()[-500:]}")


def is_begun(name: str) -> bool:
    """Whether this worker has a clone of that name: the run was started here before."""
    return (find_checkout() / ".slipstream" / "runs" / name).exists()


def choose_repository(repository: str | None, *, is_local: bool, is_begun: bool = False) -> str:
    """The git address that a run is cloned from.

    A run that is begun has its clone, so what the checkout has become since does not matter.

    Raises:
        SettingError: the checkout has changes that a clone would not have, or no `origin` that others could reach.
    """
    if repository is not None:
        return repository
    checkout = find_checkout()
    if not is_begun:
        _require_committed(checkout)
    if is_local:
        return str(checkout.resolve())
    try:
        return git(checkout, "remote", "get-url", "origin")
    except RunError as error:
        raise SettingError(
            "repository=null: the stages run on several workers and the checkout has no git remote 'origin' to clone "
            "from; set repository"
        ) from error


def choose_source(repository: str | None, revision: str, *, is_local: bool, is_begun: bool = False) -> tuple[str, str]:
    """The git address that a run is cloned from, and the commit that it starts from.

    Raises:
        SettingError: see `choose_repository` and `resolve_revision`.
    """
    address = choose_repository(repository, is_local=is_local, is_begun=is_begun)
    # HEAD of `origin` is its main branch, whatever this checkout has.
    is_ours = repository is None and revision == "HEAD"
    return address, resolve_revision(str(find_checkout()) if is_ours else address, revision)


def resolve_revision(repository: str, revision: str) -> str:
    """The commit that a name stands for in a repository.

    Raises:
        SettingError: it has no such commit, branch or tag.
    """
    if Path(repository).is_dir():
        try:
            return git(Path(repository), "rev-parse", "--verify", f"{revision}^{{commit}}")
        except RunError as error:
            raise SettingError(f"revision={revision!r}: not in {repository}") from error
    lines = git(Path(), "ls-remote", repository, revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
    if not lines and len(revision) == 40:
        return revision  # a commit that is no tip; the clone will tell
    if not lines:
        raise SettingError(f"revision={revision!r}: {repository} has no such branch or tag")
    return lines.split()[0]


def adopt(workspace: Workspace) -> bool:
    """Give a local run's results to the checkout, if it still is what the run ran; whether it was.

    Raises:
        RunError: DVC could not link the artifacts.
    """
    checkout = find_checkout()
    base = (workspace.path / BASE).read_text(encoding="utf-8")
    is_same = git(checkout, "rev-parse", "HEAD") == base and not list_changes(checkout)
    if not is_same or (checkout / "params.yaml").read_bytes() != (workspace.path / "params.yaml").read_bytes():
        return False
    _merge_lock(checkout / "dvc.lock", workspace.path / "dvc.lock")
    run_dvc(checkout, "checkout", "--allow-missing")
    return True


def _merge_lock(target: Path, source: Path) -> None:
    """Give a dvc.lock the entries of another; stages that only the first has stay: their outs are of the same code."""
    theirs = read_yaml(source)
    stages = (read_yaml(target).get("stages") or {}) if target.exists() else {}
    text = io.StringIO()
    YAML().dump(theirs | {"stages": stages | (theirs.get("stages") or {})}, text)
    write_text(target, text.getvalue())


def _require_committed(checkout: Path) -> None:
    changes = list_changes(checkout)
    if changes:
        shown = ", ".join(changes[:5]) + (f" and {len(changes) - 5} more" if len(changes) > 5 else "")
        raise SettingError(
            f"the checkout has changes that are not committed: {shown}; a run is of a commit: commit them (large "
            "ones as `dvc add` leaves them), or give settings as overrides"
        )


def lock_unsent_clones() -> Generator[Path]:
    """Clones that nobody works in and whose events have not all reached MLflow, each held while it is the current."""
    for path in sorted((find_checkout() / ".slipstream" / "runs").glob("*/.slipstream")):
        with _try_lock(path.parent) as is_ours:
            if is_ours and unsent_logs(path.parent / TRACKING):
                yield path.parent


def _prune(runs: Path) -> None:
    """Delete the oldest clones of finished runs whose events all reached MLflow."""
    finished = []
    for marker in runs.glob(f"*/{_FINISHED}"):
        with suppress(FileNotFoundError):  # another run deletes it, or works in it again
            finished.append((marker.stat().st_mtime, marker))
    for _, marker in sorted(finished, reverse=True)[KEEP_RUNS:]:
        clone = marker.parents[1]
        with _try_lock(clone) as is_ours:
            if is_ours and marker.exists() and not unsent_logs(clone / TRACKING):
                remove_path(clone)


@contextmanager
def _try_lock(clone: Path) -> Iterator[bool]:
    """Hold a clone if nobody does; whether it is held. The lock's file stays: somebody may be waiting for it."""
    with clone.with_name(f"{clone.name}.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
