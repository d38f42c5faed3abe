from pathlib import Path

import pytest
import torch

from stages.common.errors import InputError
from stages.data.rules import write_rule
from stages.models.load import load_tokenizer, save_model
from stages.models.reward_model import RANGE, init_reward_model
from stages.scoring.load import load_scorer, read_score_range
from stages.scoring.reward import RewardScorer
from stages.scoring.rule import RuleScorer
from tests.tiny import save_tiny_model


def test_a_model_gives_its_scorer_and_a_rule_its_own(tmp_path: Path) -> None:
    sft = save_tiny_model(tmp_path / "sft")
    model = init_reward_model(sft, torch.float32, seed=0)
    setattr(model.config, RANGE, [-1.5, 2.0])
    save_model(model, load_tokenizer(sft), tmp_path / "model")
    (tmp_path / "rule").mkdir()
    write_rule(tmp_path / "rule", {"p": "72"})

    assert isinstance(load_scorer(tmp_path / "model", "fp32", 64), RewardScorer)
    assert isinstance(load_scorer(tmp_path / "rule", "fp32", 64), RuleScorer)
    assert read_score_range(tmp_path / "model") == (-1.5, 2.0)
    assert read_score_range(tmp_path / "rule") == (0.0, 1.0)


def test_a_directory_with_neither_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no config\.json"):
        load_scorer(tmp_path, "fp32", 64)
    with pytest.raises(InputError, match=r"holds no config\.json"):
        read_score_range(tmp_path)
