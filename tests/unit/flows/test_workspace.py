"""Clones of a real git and DVC repository, without Prefect."""

import fcntl
import subprocess
from pathlib import Path

import pytest

from flows import sweep
from flows import workspace as workspaces
from flows.clones import list_changes
from flows.commands import git, run_dvc
from flows.parameters import RunParameters
from flows.workspace import (
    adopt,
    choose_repository,
    choose_source,
    is_begun,
    open_workspace,
    prepare_settings,
    resolve_revision,
)
from stages.common.errors import RunError, SettingError
from stages.common.pipeline import read_yaml
from tests.tools.toy_project import ROOT, Toy, make_toy


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return make_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def toy(original: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    toy = Toy(tmp_path)
    subprocess.run(["git", "clone", "-q", original.project, toy.project], check=True, timeout=60)
    monkeypatch.setenv("SLIPSTREAM_CHECKOUT", str(toy.project))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the toy has no code of its own
    return toy


def head(toy: Toy) -> str:
    return git(toy.project, "rev-parse", "HEAD")


def test_a_later_edit_of_the_checkout_does_not_reach_a_run(toy: Toy) -> None:
    with open_workspace("key", str(toy.project), head(toy)) as workspace:
        before = (workspace.path / "params.yaml").read_text()
        (toy.project / "params.yaml").write_text("")

        assert (workspace.path / "params.yaml").read_text() == before


def test_what_one_worker_pushed_another_takes_up_and_its_own_unpushed_lock_gives_way(
    toy: Toy, original: Toy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    subprocess.run(["git", "clone", "-q", "--bare", original.project, bare], check=True, timeout=60)
    other = Toy(tmp_path / "other")
    subprocess.run(["git", "clone", "-q", bare, other.project], check=True, timeout=60)
    with open_workspace("key", str(bare), head(toy)) as ours:
        prepare_settings(ours, None, {"rl.seed": 5})
        (ours.path / "dvc.lock").write_text("ours: 1\n")

        monkeypatch.setenv("SLIPSTREAM_CHECKOUT", str(other.project))
        with open_workspace("key", str(bare), head(toy)) as theirs:
            assert "seed: 5" in (theirs.path / "params.yaml").read_text()
            (theirs.path / "dvc.lock").write_text("theirs: 1\n")
            theirs.save("stage")

        ours.catch_up()

    assert (ours.path / "dvc.lock").read_text() == "theirs: 1\n"


def test_settings_of_a_run_that_has_a_branch_stay(toy: Toy) -> None:
    with open_workspace("key", str(toy.project), head(toy)) as workspace:
        prepare_settings(workspace, None, {"rl.seed": 5})
    with open_workspace("key", str(toy.project), head(toy)) as workspace:
        prepare_settings(workspace, None, {"rl.seed": 6})

        assert "seed: 5" in git(workspace.path, "show", "HEAD:params.yaml")
        assert "seed: 6" not in git(workspace.path, "show", "HEAD:params.yaml")


def test_an_unknown_recipe_or_setting_leaves_no_branch(toy: Toy) -> None:
    with open_workspace("key", str(toy.project), head(toy)) as workspace:
        with pytest.raises(SettingError, match=r"recipe='nothing': there is no recipes/nothing\.yaml"):
            prepare_settings(workspace, "nothing", {})
        with pytest.raises(SettingError, match=r"rl\.num_updates='many'"):
            prepare_settings(workspace, None, {"rl.num_updates": "many"})

    assert git(toy.project, "branch", "--list", "runs/*") == ""


def test_changes_of_code_settings_and_inputs_are_listed_and_others_are_not(toy: Toy) -> None:
    (toy.project / "params.yaml").write_text("x: 1\n")
    (toy.project / "notes.txt").touch()
    (toy.project / "dvc.lock").touch()
    (toy.project / "inputs").mkdir()
    (toy.project / "inputs/pairs.jsonl").touch()

    assert list_changes(toy.project) == ["params.yaml", "inputs/pairs.jsonl"]
    with pytest.raises(SettingError, match=r"not committed: params\.yaml, inputs/pairs\.jsonl; a run is of a commit"):
        choose_repository(None, is_local=True)


def test_a_run_of_several_workers_needs_an_address_that_all_reach(toy: Toy) -> None:
    git(toy.project, "remote", "remove", "origin")

    with pytest.raises(SettingError, match="repository=null: the stages run on several workers"):
        choose_repository(None, is_local=False)


def test_the_head_of_a_run_on_several_workers_is_the_checkouts_own(toy: Toy) -> None:
    origin = git(toy.project, "remote", "get-url", "origin")
    git(toy.project, "commit", "-q", "--allow-empty", "-m", "later")

    assert choose_source(None, "HEAD", is_local=False) == (origin, head(toy))
    assert choose_source(origin, "HEAD", is_local=False)[1] != head(toy)
    with (
        pytest.raises(SettingError, match=rf"revision='{head(toy)}': .* has no such commit; push it first"),
        open_workspace("key", origin, head(toy)),
    ):
        pass


def test_inputs_that_dvc_holds_are_restored_in_the_clone(toy: Toy) -> None:
    (toy.project / "inputs").mkdir()
    (toy.project / "inputs/pairs.jsonl").write_text("{}")
    run_dvc(toy.project, "add", "--quiet", "inputs/pairs.jsonl")
    git(toy.project, "add", "inputs")
    git(toy.project, "commit", "-q", "-m", "pairs")

    with open_workspace("key", str(toy.project), head(toy)) as workspace:
        assert not (workspace.path / "inputs/pairs.jsonl").exists()
        workspace.restore_inputs(pull=False)
        assert (workspace.path / "inputs/pairs.jsonl").read_text() == "{}"


def test_a_revision_that_is_not_there_is_named(toy: Toy) -> None:
    with pytest.raises(SettingError, match="revision='no-such'"):
        resolve_revision(str(toy.project), "no-such")
    assert resolve_revision(str(toy.project), "main") == head(toy)


def test_a_push_that_would_lose_another_workers_commit_is_refused(toy: Toy) -> None:
    with open_workspace("key", str(toy.project), head(toy)) as workspace:
        prepare_settings(workspace, None, {"rl.seed": 5})
        other = git(toy.project, "commit-tree", "-m", "other", "runs/key^{tree}", "-p", "runs/key")
        git(toy.project, "update-ref", "refs/heads/runs/key", other)
        (workspace.path / "dvc.lock").write_text("ours: 1\n")

        with pytest.raises(RunError, match="git push"):
            workspace.save("stage")


def test_a_run_that_is_begun_is_not_hindered_by_what_became_of_the_checkout(toy: Toy) -> None:
    with open_workspace("key", str(toy.project), head(toy)) as workspace:
        prepare_settings(workspace, None, {})
        (workspace.path / "dvc.lock").write_text("schema: '2.0'\n")
        workspace.save("stage")
        (toy.project / "stage.py").write_text("# another program\n")

        assert choose_repository(None, is_local=True, is_begun=is_begun("key")) == str(toy.project.resolve())
        assert not adopt(workspace)

        git(toy.project, "commit", "-q", "-a", "-m", "later")
        assert not adopt(workspace)
        assert not (toy.project / "dvc.lock").exists()

        git(toy.project, "checkout", "-q", "HEAD^")
        assert adopt(workspace)
        assert (toy.project / "dvc.lock").exists()


def test_a_run_of_some_stages_leaves_the_checkouts_other_entries(toy: Toy) -> None:
    (toy.project / "dvc.lock").write_text("schema: '2.0'\nstages: {old: {cmd: a}, both: {cmd: a}}\n")
    with open_workspace("key", str(toy.project), head(toy)) as workspace:
        (workspace.path / "dvc.lock").write_text("schema: '2.0'\nstages: {both: {cmd: b}, new: {cmd: b}}\n")

        assert adopt(workspace)

    entries = {name: entry["cmd"] for name, entry in read_yaml(toy.project / "dvc.lock")["stages"].items()}
    assert entries == {"old": "a", "both": "b", "new": "b"}


def test_old_clones_are_deleted_unless_somebody_works_in_them_again(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspaces, "KEEP_RUNS", 0)
    place, runs = (str(toy.project), head(toy)), toy.project / ".slipstream/runs"
    for key in ("idle", "busy", "reopened"):
        with open_workspace(key, *place):
            pass
    for key in ("idle", "busy", "reopened"):
        workspaces.Workspace(runs / key, key).finish()
    with open_workspace("reopened", *place):
        pass

    with (runs / "busy.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with open_workspace("next", *place):
            pass

    assert {path.name for path in runs.iterdir() if path.is_dir()} == {"busy", "reopened", "next"}
    assert (runs / "idle.lock").exists()  # somebody may be waiting for it


def test_two_clones_of_a_run_are_not_made_in_one_place(toy: Toy) -> None:
    begun = toy.project / ".slipstream/runs/key.generator-0.part/half"
    begun.parent.mkdir(parents=True)
    begun.touch()  # another worker of this machine is making it

    for name in ("key.generator-1", None):
        with open_workspace("key", str(toy.project), head(toy), name=name):
            assert begun.exists()


def test_a_sweep_that_is_started_again_keeps_its_commit(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "run_key", lambda: "sweep-1")
    first = sweep.pin(RunParameters(), sweep.LOCAL)
    assert first == {"repository": str(toy.project.resolve()), "revision": head(toy)}

    (toy.project / "stage.py").write_text("# another program\n")
    assert sweep.pin(RunParameters(), sweep.LOCAL) == first
    git(toy.project, "commit", "-q", "-a", "-m", "later")
    assert sweep.pin(RunParameters(), sweep.LOCAL) == first
    monkeypatch.setattr(sweep, "run_key", lambda: "sweep-2")
    assert sweep.pin(RunParameters(), sweep.LOCAL)["revision"] == head(toy)
