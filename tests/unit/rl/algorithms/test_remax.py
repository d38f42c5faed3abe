import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.rl.algorithms import remax
from stages.rl.algorithms.remax import Remax
from stages.rl.records import LossInputs, Rollout
from tests.unit.rl.algorithms.toy import enumerate_completions, greedy_completion, toy_logprobs

MASK = torch.tensor([[True, True], [True, False]])


def test_loss_matches_hand_computation() -> None:
    logprobs = torch.tensor([[-1.0, -2.0], [-3.0, -9.0]])
    scores = remax.compute_advantages(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 3.0]))  # [1, -2]
    loss, _ = remax.compute_loss(logprobs, scores[:, None].expand(-1, 2), MASK, num_completions=2)
    torch.testing.assert_close(loss, torch.tensor(-1.5))  # (1*1 + 1*2 - 2*3) / 2; -9 is padding


@pytest.mark.parametrize("kl_mode", ["none", "full_step"])
@pytest.mark.parametrize("seed", range(3))
def test_expected_gradient_is_the_exact_policy_gradient(kl_mode: str, seed: int) -> None:
    """Summed over all 15 completions with their probabilities, -gradient = d E[score - 0.3 KL] / d table."""
    g = torch.Generator().manual_seed(seed)
    completions = enumerate_completions()
    table = torch.randn(3, 4, 3, generator=g, dtype=torch.float64, requires_grad=True)
    reference = toy_logprobs(torch.randn(3, 4, 3, generator=g, dtype=torch.float64), completions)
    scores = torch.randn(len(completions.mask), generator=g, dtype=torch.float64)
    kl_coef = 0.3 if kl_mode == "full_step" else 0.0

    per_token = torch.where(completions.mask, toy_logprobs(table, completions), 0.0)
    probabilities = per_token.sum(1).exp()
    torch.testing.assert_close(probabilities.sum(), torch.tensor(1.0, dtype=torch.float64))
    log_ratios = torch.where(completions.mask, per_token - reference, 0.0).sum(1)
    objective = (probabilities * (scores - kl_coef * log_ratios)).sum()
    (exact,) = torch.autograd.grad(objective, table)

    algorithm = Remax(samples_per_prompt=1, kl_coef=kl_coef, kl_mode=kl_mode)  # type: ignore[arg-type]
    greedy = greedy_completion(table, completions)
    expected = torch.zeros_like(exact)
    for row, probability in enumerate(probabilities.tolist()):
        rollout = Rollout(
            scores=torch.stack([scores[row], scores[greedy]]),
            is_finished=torch.tensor([True, True]),
            is_greedy=torch.tensor([False, True]),
            groups=torch.tensor([0, 0]),
        )
        (unit,), _ = algorithm.select(rollout)
        logprobs = toy_logprobs(table, completions)[row : row + 1]
        inputs = LossInputs(
            completion_mask=completions.mask[row : row + 1],
            advantages=torch.full((1, 3), unit.advantages[0], dtype=torch.float64),
            sampling_logprobs=logprobs.detach(),
            reference_logprobs=reference[row : row + 1],
        )
        loss, _ = algorithm.compute_loss(logprobs, inputs, num_units=1)
        expected -= probability * torch.autograd.grad(loss, table)[0]

    torch.testing.assert_close(expected, exact, atol=1e-10, rtol=1e-6)


def test_one_step_kl_holds_the_states_fixed() -> None:
    """A token pays for its own log-ratio only; full_step also for those after it."""
    logprobs = torch.tensor([[-1.0, -2.0, -4.0]])
    reference = torch.tensor([[-1.5, -1.0, -9.0]])
    mask = torch.tensor([[True, True, False]])

    one_step = remax.kl_cost(logprobs, reference, mask, "one_step")
    full_step = remax.kl_cost(logprobs, reference, mask, "full_step")

    assert one_step.tolist() == [[0.5, -1.0, 0.0]]
    assert full_step.tolist() == [[-0.5, -1.0, 0.0]]


def test_every_sample_is_measured_against_the_greedy_one_of_its_own_prompt() -> None:
    rollout = Rollout(
        scores=torch.tensor([5.0, 1.0, 2.0, 7.0, 3.0, 10.0]),
        is_finished=torch.ones(6, dtype=torch.bool),
        is_greedy=torch.tensor([False, False, True, False, False, True]),
        groups=torch.tensor([0, 0, 0, 1, 1, 1]),
    )

    units, metrics = Remax(samples_per_prompt=2, kl_coef=0.0, kl_mode="none").select(rollout)

    assert [(unit.rows, unit.advantages) for unit in units] == [
        ((0,), (3.0,)),  # 5 - 2
        ((1,), (-1.0,)),  # 1 - 2
        ((3,), (-3.0,)),  # 7 - 10
        ((4,), (-7.0,)),  # 3 - 10
    ]
    assert metrics["remax/sample_beats_greedy"].value == 0.25


@given(constant=st.floats(-100, 100))
def test_adding_a_constant_to_the_reward_model_changes_no_advantage(constant: float) -> None:
    scores, greedy = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 4.0])

    shifted = remax.compute_advantages(scores + constant, greedy + constant)

    torch.testing.assert_close(shifted, remax.compute_advantages(scores, greedy), atol=1e-4, rtol=0)


@given(seed=st.integers(0, 2**16), cut=st.integers(0, 6))
def test_micro_batches_add_up_to_the_batch(seed: int, cut: int) -> None:
    g = torch.Generator().manual_seed(seed)
    batch = torch.randn(6, 5, generator=g), torch.randn(6, 5, generator=g), torch.rand(6, 5, generator=g) > 0.3
    whole, _ = remax.compute_loss(*batch, num_completions=6)
    head, _ = remax.compute_loss(*(x[:cut] for x in batch), num_completions=6)
    tail, _ = remax.compute_loss(*(x[cut:] for x in batch), num_completions=6)
    torch.testing.assert_close(head + tail, whole)


def test_wrong_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"advantages has shape \(2, 1\), expected \(2, 2\)"):
        remax.compute_loss(torch.zeros(2, 2), torch.zeros(2, 1), MASK, num_completions=2)
