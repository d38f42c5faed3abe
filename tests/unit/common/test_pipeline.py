from pathlib import Path

import pytest

from stages.common.errors import RunError
from stages.common.pipeline import StageEntry, flatten, read_out_hashes, read_settings, read_stage


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_entries_may_be_paths_or_options() -> None:
    Path("dvc.yaml").write_text(
        "stages: {a: {cmd: [one, two], deps: [x], outs: [o, {p: {cache: false}}], metrics: [{m: {}}],"
        " params: [rl, {other.yaml: [k]}, {whole.yaml: null}]}}"
    )
    Path("params.yaml").write_text("rl: {kl_coef: 1}")
    Path("other.yaml").write_text("k: 2")
    Path("whole.yaml").write_text("z: 3")

    entry = read_stage("a")

    params = (("params.yaml", "rl"), ("other.yaml", "k"), ("whole.yaml", None))
    assert entry == StageEntry("a", "one\ntwo", ("x",), ("o", "p", "m"), params)
    assert read_settings(entry) == {"rl": {"kl_coef": 1}, "other.yaml:k": 2, "whole.yaml:": {"z": 3}}


def test_an_unknown_stage_is_named() -> None:
    Path("dvc.yaml").write_text("stages: {}")

    with pytest.raises(RunError, match=r"dvc\.yaml: has no stage 'a'"):
        read_stage("a")


def test_hashes_of_outs_are_read_and_a_truncated_lock_has_none() -> None:
    lock = "stages:\n  a:\n    outs:\n    - path: artifacts/a\n      md5: 00ff.dir\n"
    Path("dvc.lock").write_text(lock)
    assert read_out_hashes() == {"artifacts/a": "00ff.dir"}

    Path("dvc.lock").write_text("stages: {a: [")
    assert read_out_hashes() == {}


def test_settings_are_flattened_to_dotted_keys() -> None:
    assert flatten({"rl": {"algorithm": {"name": "remax"}, "empty": {}}}) == {
        "rl.algorithm.name": "remax",
        "rl.empty": {},
    }
