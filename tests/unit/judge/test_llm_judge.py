from pathlib import Path

import pytest

from stages.judge.config import JudgeConfig
from stages.judge.llm_judge import _find_workdir
from stages.judge.opponents import Opponent, Places


def test_versions_that_are_judged_together_share_a_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [Path("samples/0002"), Path("samples/0004")]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "sft.parquet").write_text(f"measured beside {folder}")
    opponents = [Opponent("sft", {}, sha256=str(folder)) for folder in folders]
    config = JudgeConfig(model="m")

    alone, together = (
        {
            _find_workdir(Places(folder, evaluation=evaluation), opponent, config)
            for folder, opponent in zip(folders, opponents, strict=True)
        }
        for evaluation in (None, Path("samples"))
    )

    assert (len(alone), len(together)) == (2, 1)
