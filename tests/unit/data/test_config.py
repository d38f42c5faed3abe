from pathlib import Path

import pytest

from stages.common.config import load_section
from stages.common.errors import SettingError
from stages.data.config import DataConfig
from stages.data.scorers import LengthScorer, ModelScorer, TextblobScorer, VaderScorer

SIZES = "data: {seed: 0, num_validation_prompts: 2, num_heldout_prompts: 3, task: "


def load(tmp_path: Path, task: str) -> DataConfig:
    path = tmp_path / "params.yaml"
    path.write_text(SIZES + task + "}\n")
    return load_section("data", DataConfig, path)


def test_reviews_has_vader_as_gold_and_textblob_beside_it(tmp_path: Path) -> None:
    assert load(tmp_path, "{name: reviews}").task.scorers() == (VaderScorer(), TextblobScorer())


def test_a_task_of_files_has_no_scorer_unless_it_names_one(tmp_path: Path) -> None:
    assert load(tmp_path, "{name: pairs, source: a.csv}").task.scorers() == (None, None)
    task = "{name: instructions, source: a.csv, gold: {name: model, path: rm}, second: {name: length}}"
    assert load(tmp_path, task).task.scorers() == (ModelScorer(path="rm"), LengthScorer())


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("{name: revues}", r"data\.task\.name=.*'reviews', 'pairs', 'instructions'"),
        ("{name: pairs}", r"data\.task\.(pairs\.)?source: missing"),
        ("{name: reviews, num_prompts: 0}", r"data\.task\.(reviews\.)?num_prompts=0: input should be greater than"),
        ("{name: reviews, source: a.csv}", r"data\.task\.(reviews\.)?source: unknown setting"),
        (
            "{name: pairs, source: a.csv, gold: {name: bleu}}",
            r"data\.task\.gold\.name='bleu': allowed: 'none', 'vader', 'textblob'",
        ),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_allowed(tmp_path: Path, task: str, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        load(tmp_path, task)
