import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.rl.algorithms.copg import compute_loss


def test_loss_of_a_pair_matches_hand_computation() -> None:
    loss, regularised = compute_loss(torch.tensor([3.0, 1.0]), torch.tensor([2.0, 1.0]), 2, beta=0.5)

    assert regularised.tolist() == [0.5, 0.5]  # 2 - 1.5 and 1 - 0.5
    assert loss.tolist() == [0.0]
    loss, _ = compute_loss(torch.tensor([1.0, 1.0]), torch.tensor([2.0, 1.0]), 2, beta=0.5)
    assert loss.tolist() == [1.0]  # (R - R')² / (2β) = 1 / 1


@given(seed=st.integers(0, 2**16), num_samples=st.integers(2, 5))
def test_loss_is_the_mean_over_all_pairs(seed: int, num_samples: int) -> None:
    g = torch.Generator().manual_seed(seed)
    log_ratios, scores = (torch.randn(num_samples, generator=g, dtype=torch.float64) for _ in range(2))

    (loss,), regularised = compute_loss(log_ratios, scores, num_samples, beta=0.3)

    pairs = [(i, j) for i in range(num_samples) for j in range(i)]
    squares = [(regularised[i] - regularised[j]).square() / (2 * 0.3) for i, j in pairs]
    torch.testing.assert_close(loss, torch.stack(squares).mean())


@given(seed=st.integers(0, 2**16))
def test_the_optimal_policy_is_a_minimum_whoever_samples(seed: int) -> None:
    """There log π/π_ref = score/β less a constant of the prompt."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(6, generator=g, dtype=torch.float64)

    loss, _ = compute_loss(scores / 0.2 - 1.7, scores, 3, beta=0.2)

    assert loss.tolist() == pytest.approx([0.0, 0.0], abs=1e-20)
