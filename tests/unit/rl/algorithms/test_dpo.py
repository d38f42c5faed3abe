import math
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.rl.algorithms.dpo import compute_pair_loss

LOGPROBS = torch.tensor([[-1.0, -1.0], [-2.0, -50.0], [-3.0, -9.0], [-1.0, -1.0]])
REFERENCE = torch.tensor([[-2.0, -3.0], [-1.0, -70.0], [-3.0, -1.0], [-3.0, -4.0]])
MASK = torch.tensor([[True, True], [True, False], [True, False], [True, True]])
# Log-ratios: chosen (-1+2) + (-1+3) = 3, rejected -2+1 = -1, so 4; chosen -3+3 = 0, rejected 2 + 3 = 5, so -5.


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("sigmoid", (math.log(1 + math.exp(-0.4)) + math.log(1 + math.exp(0.5))) / 2),
        ("ipo", 50.5),  # ((4 - 5)² + (-5 - 5)²) / 2
    ],
)
def test_losses_match_hand_computation(loss: Literal["sigmoid", "ipo"], expected: float) -> None:
    computed, metrics = compute_pair_loss(LOGPROBS, REFERENCE, MASK, beta=0.1, loss=loss, num_pairs=2)

    assert computed.item() == pytest.approx(expected, abs=1e-6)
    assert metrics["dpo/accuracy"].value == 0.5  # the first pair is right, the second wrong
    assert metrics["dpo/margin"].value == pytest.approx(-0.05)  # 0.1 · (4 - 5) / 2
    assert metrics["dpo/chosen_reward"].value == pytest.approx(0.15)  # 0.1 · (3 + 0) / 2


def test_without_a_difference_every_token_is_pushed_by_half_of_beta_and_padding_by_nothing() -> None:
    logprobs = REFERENCE[:2].clone().requires_grad_()

    loss, metrics = compute_pair_loss(logprobs, REFERENCE[:2], MASK[:2], beta=0.1, loss="sigmoid", num_pairs=1)
    loss.backward()

    # d/dx -log σ(0.1 Δ) at Δ = 0 is -0.1 / 2 times dΔ/dx, which is 1 for chosen and -1 for rejected tokens.
    torch.testing.assert_close(logprobs.grad, torch.tensor([[-0.05, -0.05], [0.05, 0.0]]))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["dpo/accuracy"].value == 0.5  # a tie counts half


@given(seed=st.integers(0, 2**16), cut=st.integers(0, 3), loss=st.sampled_from(["sigmoid", "ipo"]))
def test_micro_batches_add_up_to_the_batch(seed: int, cut: int, loss: Literal["sigmoid", "ipo"]) -> None:
    g = torch.Generator().manual_seed(seed)
    logprobs, reference = torch.randn(6, 4, generator=g), torch.randn(6, 4, generator=g)
    mask = torch.rand(6, 4, generator=g) > 0.2

    whole, head, tail = (
        compute_pair_loss(logprobs[rows], reference[rows], mask[rows], beta=0.3, loss=loss, num_pairs=3)
        for rows in (slice(None), slice(0, 2 * cut), slice(2 * cut, None))
    )

    torch.testing.assert_close(head[0] + tail[0], whole[0])
    for name, mean in whole[1].items():
        assert (head[1][name] + tail[1][name]).value == pytest.approx(mean.value, abs=1e-6)


def test_a_wrong_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"reference_logprobs has shape \(4, 1\), expected \(4, 2\)"):
        compute_pair_loss(LOGPROBS, REFERENCE[:, :1], MASK, beta=0.1, loss="sigmoid", num_pairs=2)
