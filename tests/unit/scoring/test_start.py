from pathlib import Path

import pytest
import torch

from stages.common.errors import InputError
from stages.data.rules import write_rule
from stages.data.scorers import LengthScorer, ModelScorer, NoScorer, RuleScorer, TextblobScorer, VaderScorer
from stages.models.load import load_tokenizer, save_model
from stages.models.reward_model import init_reward_model
from stages.scoring import lexicon
from stages.scoring.reward import RewardScorer
from stages.scoring.start import start_scorer
from tests.fakes import make_completion
from tests.tiny import save_tiny_model


def test_each_setting_starts_its_scorer() -> None:
    unused = Path("unused")

    assert start_scorer(None, unused, unused) is None
    assert start_scorer(NoScorer(), unused, unused) is None
    assert isinstance(start_scorer(VaderScorer(), unused, unused), lexicon.VaderScorer)
    assert isinstance(start_scorer(TextblobScorer(), unused, unused), lexicon.TextblobScorer)
    assert isinstance(start_scorer(LengthScorer(), unused, unused), lexicon.LengthScorer)


def test_a_tasks_rule_is_read_from_its_data(tmp_path: Path) -> None:
    write_rule(tmp_path, {"p": "72"})

    scorer = start_scorer(RuleScorer(), Path("unused"), tmp_path)

    assert scorer is not None
    assert scorer.score([make_completion("#### 72"), make_completion("#### 7")]) == [1.0, 0.0]


def test_a_gold_model_must_share_the_policys_tokenizer(tmp_path: Path) -> None:
    policy = save_tiny_model(tmp_path / "policy")
    gold = tmp_path / "gold"
    save_model(init_reward_model(policy, torch.float32, seed=0), load_tokenizer(policy), gold)
    completion = make_completion("x")

    scorer = start_scorer(ModelScorer(name="model", path=str(gold)), policy, tmp_path)
    assert isinstance(scorer, RewardScorer)
    assert len(scorer.score([completion, completion])) == 2

    tokenizer = load_tokenizer(policy)
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(gold)
    with pytest.raises(InputError, match=r"gold: the gold model's tokenizer differs from that of .*policy"):
        start_scorer(ModelScorer(name="model", path=str(gold)), policy, tmp_path)
