"""`make run RECIPE=NAME`: a recipe in a workspace of its own, so that two recipes never replace each other's artifacts.

The workspace is a clone in `.slipstream/recipes/NAME`, at the checkout's commit, with the checkout's DVC cache and
MLflow store and hard links to its `inputs/`. Its params.yaml is the recipe. Settings and dvc.lock are commits on branch
`recipes/NAME`, which is pushed to the checkout, so that `dvc gc --all-branches` keeps what they name. Nothing else of
the checkout changes. The next run goes on where this one was.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager
from pathlib import Path

from flows.clones import BASE, find_checkout, list_changes, make_clone, wait_for_lock
from flows.commands import git
from flows.dvc import die_with_make, reproduce
from flows.parameters import find_recipe
from stages.check_params import require_settings
from stages.common.entry import run_entry
from stages.common.errors import RunError, SettingError
from stages.common.pipeline import DVC_LOCK
from stages.common.pipeline_record import read_timings
from stages.common.publish import remove_path
from stages.common.tracking_client import tracking_uri
from stages.judge.llm.verdicts import VERDICTS, VERDICTS_VARIABLE
from stages.link_runs import link_runs
from stages.report import METRICS, format_report

WORKSPACES = Path(".slipstream/recipes")
INPUTS = Path("inputs")
_CODE = ("stages/", "flows/", "dvc.yaml", ".dvc/", ".dvcignore")
"""What a run is made of beside its settings and inputs."""


def main() -> None:
    """Run a recipe, or the stages of it that are named."""
    parser = argparse.ArgumentParser(prog="python -m flows.recipe", description=__doc__)
    parser.add_argument("recipe", help="recipes/NAME.yaml")
    parser.add_argument("stages", nargs="*", help="stages of dvc.yaml; default: all")
    arguments = parser.parse_args()
    die_with_make()
    run_recipe(find_checkout(), arguments.recipe, arguments.stages)


def run_recipe(checkout: Path, recipe: str, stages: Sequence[str]) -> None:
    """Bring a recipe's workspace up to date and print its result.

    Args:
        checkout: the project's folder.
        recipe: its name.
        stages: to bring up to date, each without those before it; none: the whole pipeline.

    Raises:
        SettingError: there is no such recipe, its settings are wrong, or there is code that is not committed.
        RunError: a stage, git or DVC failed.
    """
    path = find_recipe(checkout, recipe).resolve()
    require_settings(path)
    require_committed_code(checkout)
    with chdir(checkout):
        os.environ["MLFLOW_TRACKING_URI"] = tracking_uri()
    os.environ["SLIPSTREAM_RECIPE"] = recipe
    # Verdicts of an LLM judge are paid for: all workspaces share the checkout's.
    os.environ.setdefault(VERDICTS_VARIABLE, str(checkout.resolve() / VERDICTS))
    with open_recipe(checkout, recipe) as workspace, chdir(workspace):
        try:
            for stage in stages or (None,):
                reproduce(stage)
        finally:
            _save(workspace, recipe, "results")
        link_runs(list(stages))
        sys.stdout.write(format_report(METRICS, read_timings()))
    sys.stdout.write(f"\nAll of it is in {find_workspace(checkout, recipe)}\n")


@contextmanager
def open_recipe(checkout: Path, recipe: str) -> Iterator[Path]:
    """The recipe's workspace at the checkout's commit, with its settings and inputs; held by us alone.

    Args:
        checkout: the project's folder.
        recipe: its name.

    Raises:
        SettingError: there is no such recipe.
        RunError: git cannot make or update the clone.
    """
    workspace = find_workspace(checkout, recipe).resolve()
    workspace.parent.mkdir(parents=True, exist_ok=True)
    commit = git(checkout, "rev-parse", "HEAD")
    with (workspace.parent / f"{recipe}.lock").open("a") as lock:
        wait_for_lock(lock, workspace)
        if not workspace.exists():
            make_clone(workspace, str(checkout.resolve()), commit)
        elif (workspace / BASE).read_text(encoding="utf-8") != commit:
            _move_to(workspace, commit)
        link_inputs(checkout / INPUTS, workspace / INPUTS)
        (workspace / "params.yaml").write_bytes(find_recipe(checkout, recipe).read_bytes())
        _save(workspace, recipe, "settings")
        yield workspace


def find_workspace(checkout: Path, recipe: str) -> Path:
    """Where a recipe runs, whether or not it has."""
    return checkout / WORKSPACES / recipe


def describe_lag(checkout: Path, recipe: str) -> str | None:
    """In what an existing workspace is behind the checkout, which the next run will bring to it; None: in nothing."""
    workspace = find_workspace(checkout, recipe)
    behind = []
    if (workspace / BASE).read_text(encoding="utf-8") != git(checkout, "rev-parse", "HEAD"):
        behind.append("the commit")
    if (workspace / "params.yaml").read_bytes() != find_recipe(checkout, recipe).read_bytes():
        behind.append("the recipe")
    return f"{' and '.join(behind)} changed since its last run" if behind else None


def require_committed_code(checkout: Path) -> None:
    """A clone has what is committed, so what is not would silently not run. The recipe itself may be uncommitted.

    Raises:
        SettingError: it names the files.
    """
    changes = [name for name in list_changes(checkout) if name.startswith(_CODE)]
    if changes:
        shown = ", ".join(changes[:5]) + (f" and {len(changes) - 5} more" if len(changes) > 5 else "")
        raise SettingError(f"code that is not committed: {shown}; a recipe runs a commit: commit it or put it aside")


def link_inputs(source: Path, target: Path) -> None:
    """Give the workspace the checkout's inputs, by hard links; what the checkout no longer has goes.

    Args:
        source: the checkout's folder. Links in it become links to the same place.
        target: the workspace's.

    Raises:
        RunError: the two lie on file systems that have no hard links between them.
    """
    there = {path.relative_to(source) for path in _list_files(source)}
    for path in _list_files(target):
        if path.relative_to(target) not in there:
            path.unlink()
    for name in sorted(there):
        _link(source / name, target / name)


def _list_files(folder: Path) -> Iterator[Path]:
    """Files and links below a folder; links to folders are not followed."""
    for parent, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        yield from (Path(parent) / name for name in (*files, *links))


def _link(source: Path, target: Path) -> None:
    if target.exists() and source.samefile(target):
        return
    remove_path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_symlink():
        target.symlink_to(source.resolve())
        return
    try:
        os.link(source, target)
    except OSError as error:
        reason = f"{source}: no hard link to it can be made in {target.parent}: {error.strerror}"
        raise RunError(f"{reason}; keep it on the checkout's file system, or let it be a symbolic link") from error


def _move_to(workspace: Path, commit: str) -> None:
    """Take the checkout's new commit, keeping dvc.lock: DVC then finds what the change reaches."""
    lock = workspace / DVC_LOCK
    kept = lock.read_bytes() if lock.exists() else None
    git(workspace, "fetch", "--quiet", "origin", "HEAD")
    git(workspace, "checkout", "--quiet", "--force", "--detach", commit)
    if kept is not None:
        lock.write_bytes(kept)
    (workspace / BASE).write_text(commit, encoding="utf-8")


def _save(workspace: Path, recipe: str, what: str) -> None:
    """Commit settings and dvc.lock where they changed, and give the branch to the checkout."""
    names = [name for name in ("params.yaml", str(DVC_LOCK)) if (workspace / name).exists()]
    git(workspace, "add", "--", *names)
    if git(workspace, "diff", "--cached", "--name-only"):
        git(workspace, "commit", "--quiet", "--no-verify", "-m", f"recipe {recipe}: {what}")
    # A new commit of the checkout starts the branch anew.
    git(workspace, "push", "--quiet", "--force", "origin", f"HEAD:refs/heads/recipes/{recipe}")


if __name__ == "__main__":
    run_entry(main)
