import math
from pathlib import Path

import pytest
import torch

from stages.common.config import load_section
from stages.data.batches import collate
from stages.data.text import TokenSequence
from stages.data.token_pairs import TokenPair, encode_pairs
from stages.models.reward_model import RANGE, compute_scores, init_reward_model, load_reward_model
from stages.reward.config import RewardConfig
from stages.reward.evaluate import calibration_table, measure_accuracy
from stages.reward.train import bradley_terry_loss, centre_scores, compute_margins
from tests.fakes import make_completion
from tests.tiny import save_tiny_model

CONFIG = load_section("reward", RewardConfig)
EOS = 258


def test_bradley_terry_loss_matches_hand_computation() -> None:
    loss = bradley_terry_loss(torch.tensor([0.0, 2.0]))

    assert loss.item() == pytest.approx(math.log(2) + math.log(1 + math.exp(-2)), abs=1e-6)


def test_the_end_of_sequence_token_is_what_the_score_is_read_at(tmp_path: Path) -> None:
    """pad = eos here: a score read at the last token that is not padding by value would ignore the ending."""
    model = init_reward_model(save_tiny_model(tmp_path), torch.float32, seed=0)
    finished, cut = TokenSequence((1, 2), (3, 4, EOS)), TokenSequence((1, 2), (3, 4))
    longer = TokenSequence((1, 2), (3, 4, 5, 6, 7, EOS))

    with torch.no_grad():
        batch = collate([finished, cut, longer])
        together = compute_scores(model, batch)
        alone = [
            compute_scores(model, single)[0] for single in (collate([finished]), collate([cut]), collate([longer]))
        ]

    torch.testing.assert_close(together, torch.stack(alone), atol=1e-5, rtol=1e-5)
    assert abs(together[0] - together[1]) > 1e-4


def test_scores_are_centred_on_sft_samples_and_the_shift_is_saved_with_the_model(tmp_path: Path) -> None:
    model = init_reward_model(save_tiny_model(tmp_path / "sft"), torch.float32, seed=0)
    config = CONFIG.model_copy(update={"learner": CONFIG.learner.model_copy(update={"dtype": "fp32"})})
    samples = [make_completion("x", token_ids=(index, EOS)) for index in range(5)]

    centre_scores(model, samples, config)
    model.save_pretrained(tmp_path / "reward")

    loaded = load_reward_model(tmp_path / "reward", torch.float32)
    batch = collate([TokenSequence(item.prompt_ids, item.token_ids) for item in samples])
    with torch.no_grad():
        scores = compute_scores(loaded, batch)
    assert scores.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert getattr(loaded.config, RANGE) == pytest.approx([scores.min().item(), scores.max().item()], abs=1e-5)


def test_margins_keep_the_order_of_their_pairs(tmp_path: Path) -> None:
    model = init_reward_model(save_tiny_model(tmp_path), torch.float32, seed=0)
    pairs = [TokenPair("p", (1, 2), tuple(range(3, 3 + n)), (9,) * n, "", "") for n in (2, 7, 4, 1)]
    examples, _ = encode_pairs(pairs, max_tokens=CONFIG.max_tokens, too_long=CONFIG.too_long)
    config = CONFIG.model_copy(update={"learner": CONFIG.learner.model_copy(update={"dtype": "fp32"})})

    together = compute_margins(model, examples, config)

    alone = [compute_margins(model, [example], config)[0] for example in examples]
    assert together == pytest.approx(alone, abs=1e-5)


def test_accuracy_counts_ties_half() -> None:
    accuracy = measure_accuracy([1.0, -1.0, 0.0, 2.0], ["a", "a", "b", "c"], seed=0)

    assert accuracy.value == 0.625  # (1 + 0 + 0.5 + 1) / 4
    low, high = accuracy.interval
    assert 0 <= low <= 0.625 <= high <= 1


def test_calibration_compares_confidence_with_accuracy() -> None:
    table = calibration_table([3.0, 3.0, 0.0, -0.0], num_bins=2)

    assert table[0] == {"confidence": 0.5, "accuracy": 0.5, "num_pairs": 2}
    assert table[1]["confidence"] == pytest.approx(0.9526, abs=1e-4)  # 1 / (1 + e^-3)
    assert table[1]["accuracy"] == 1.0
