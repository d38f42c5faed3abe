import pytest
import torch

from stages.rl.algorithms.ppo import ClippedValueLoss, generalised_advantages
from stages.rl.records import LossInputs, Totals
from tests.unit.rl.algorithms.cases import make

MASK = torch.tensor([[True, True, True], [True, False, False]])


def make_inputs() -> LossInputs:
    return LossInputs(
        MASK,
        groups=torch.tensor([0, 1]),
        advantages=torch.where(MASK, torch.tensor([[4.0], [2.0]]), 0.0),  # the scores
        sampling_logprobs=torch.zeros(2, 3),
        reference_logprobs=torch.where(MASK, -1.0, 77.0),  # k1 = 1 at every token
        values=torch.tensor([[1.0, 2.0, 3.0], [0.5, 99.0, 99.0]]),
    )


def test_advantages_match_hand_computation() -> None:
    rewards = torch.tensor([[0.0, 0.0, 4.0], [2.0, 88.0, 88.0]])
    values = torch.tensor([[1.0, 2.0, 3.0], [0.5, 99.0, 99.0]])

    result = generalised_advantages(rewards, values, MASK, gamma=0.5, gae_lambda=0.5)

    # From the end: δ = 4 - 3 = 1; δ = 0.5*3 - 2 = -0.5, A = -0.5 + 0.25*1; δ = 0.5*2 - 1 = 0, A = 0.25*-0.25.
    torch.testing.assert_close(result, torch.tensor([[-0.0625, -0.25, 1.0], [1.5, 0.0, 0.0]]))


def test_with_lambda_1_a_return_is_what_is_still_to_come() -> None:
    algorithm = make("ppo", kl_coef=0.1, gae_lambda=1.0, whiten_advantages=False)

    shaped, metrics = algorithm.compute_advantages(make_inputs())

    # 4 at the end less 0.1 a token; 2 - 0.1.
    assert shaped.returns is not None
    torch.testing.assert_close(shaped.returns, torch.tensor([[3.7, 3.8, 3.9], [1.9, 0.0, 0.0]]))
    torch.testing.assert_close(shaped.advantages, torch.tensor([[2.7, 1.8, 0.9], [1.4, 0.0, 0.0]]))
    assert metrics["value/mean"].value == pytest.approx((1 + 2 + 3 + 0.5) / 4)


def test_whitened_advantages_leave_the_returns_alone() -> None:
    plain, _ = make("ppo", whiten_advantages=False).compute_advantages(make_inputs())
    white, _ = make("ppo").compute_advantages(make_inputs())

    kept = white.advantages[MASK]
    assert kept.mean().item() == pytest.approx(0, abs=1e-6)
    assert kept.std(correction=0).item() == pytest.approx(1, rel=1e-5)
    assert torch.equal(white.returns, plain.returns)  # type: ignore[arg-type]


def test_a_value_pays_no_more_once_it_moved_by_the_clip_range() -> None:
    inputs = make_inputs()
    inputs = LossInputs(**{**vars(inputs), "returns": torch.tensor([[2.0, 2.0, 2.0], [2.0, 0.0, 0.0]])})
    values = torch.tensor([[1.1, 5.0, 2.5], [0.5, 5.0, 5.0]], requires_grad=True)

    loss, metrics = ClippedValueLoss(clip=0.2).compute_loss(values, inputs, Totals(2, 4))
    loss.backward()

    # Old values 1, 2, 3, 0.5. Moved by 0.1: (1.1-2)²; by 3: the larger of 9 and 0.04; by -0.5 for the better:
    # clipped to 2.8, 0.64 above 0.25; not moved: 2.25. Half their mean.
    assert loss.item() == pytest.approx(0.5 * (0.81 + 9 + 0.64 + 2.25) / 4)
    assert values.grad is not None
    assert values.grad[0, 2].item() == 0.0
    assert (values.grad[1, 1:] == 0).all()
    assert metrics["value/clipped_fraction"].value == 0.25
