from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stages.data.batches import collate
from stages.data.text import TokenSequence
from stages.models.load import load_tokenizer, save_model
from stages.models.reward_model import compute_scores, init_reward_model
from stages.scoring.reward import RewardScorer
from tests.fakes import make_completion
from tests.tiny import save_tiny_model


@pytest.mark.parametrize("micro_batch_tokens", [8, 64])
def test_reading_each_prompt_once_changes_no_score(tmp_path: Path, micro_batch_tokens: int) -> None:
    sft = save_tiny_model(tmp_path / "sft")
    model = init_reward_model(sft, torch.float32, seed=3)
    save_model(model, load_tokenizer(sft), tmp_path / "reward")
    completions = [
        replace(make_completion("x", token_ids=tuple(range(20, 20 + length))), prompt_ids=prompt_ids)
        for length, prompt_ids in [(3, (1, 2)), (1, (4, 5, 6, 7)), (5, (1, 2)), (2, (4, 5, 6, 7)), (4, (9,))]
    ]
    batch = collate([TokenSequence(item.prompt_ids, item.token_ids) for item in completions])
    with torch.no_grad():
        expected = compute_scores(model.eval(), batch)

    scores = RewardScorer(tmp_path / "reward", "fp32", micro_batch_tokens).score(completions)

    torch.testing.assert_close(torch.tensor(scores), expected, atol=1e-5, rtol=1e-5)
