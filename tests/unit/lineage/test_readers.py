from pathlib import Path

import pytest

from stages.lineage.readers import _find_hash

LOCK = """
schema: '2.0'
stages:
  prepare_data: {cmd: x, outs: [{path: artifacts/data, md5: 00ffee.dir}]}
  train_sft: {cmd: x, deps: [{path: artifacts/data, md5: 0ddba11.dir}, {path: inputs/rows.csv, md5: abcdef}]}
"""


def test_a_path_stands_for_what_was_made_last_not_for_what_was_read_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dvc.lock").write_text(LOCK)

    assert _find_hash("artifacts/data") == "00ffee.dir"
    assert _find_hash("inputs/rows.csv") == "abcdef"
