from pathlib import Path

import pytest

from flows.lock_file import find_damage, heal_lock, keep_lock

DVC_YAML = "stages: {a: {cmd: x}, b: {cmd: x}}"
LOCK = """\
schema: '2.0'
stages:
  a:
    cmd: x
    outs:
    - path: a
      md5: '00'
  b:
    cmd: x
    outs:
    - path: b
      md5: '11'
"""


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dvc.yaml").write_text(DVC_YAML)
    Path("dvc.lock").write_text(LOCK)
    keep_lock()


@pytest.mark.parametrize(
    "cut", ["", "schema", "schema: '2.0'\n", LOCK[: LOCK.index("  b:")], LOCK[: LOCK.rindex("    outs:")]]
)
def test_a_cut_lock_is_replaced_by_the_good_copy(cut: str) -> None:
    Path("dvc.lock").write_text(cut)
    keep_lock()  # must not take the damaged one

    assert heal_lock()
    assert Path("dvc.lock").read_text() == LOCK


def test_a_lock_is_left_alone_if_it_is_whole_or_its_stage_was_removed() -> None:
    assert not heal_lock()

    Path("dvc.yaml").write_text("stages: {a: {cmd: x}}")
    Path("dvc.lock").write_text(LOCK[: LOCK.index("  b:")])
    assert find_damage() is None


def test_without_a_good_copy_the_damaged_lock_is_set_aside() -> None:
    Path(".slipstream/dvc.lock.good").unlink()
    Path("dvc.lock").write_text("stages: [")

    assert heal_lock()
    assert not Path("dvc.lock").exists()
    assert Path("dvc.lock.broken").read_text() == "stages: ["
