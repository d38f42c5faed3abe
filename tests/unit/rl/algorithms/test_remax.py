import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.common.metrics import Mean
from stages.rl.algorithms import remax
from stages.rl.algorithms.kl import kl_cost
from stages.rl.records import LossInputs, Predictions, Rollout, Totals
from tests.unit.rl.algorithms.cases import make


def make_rollout(is_greedy: list[bool], scores: list[float], groups: list[int]) -> Rollout:
    return Rollout(
        scores=torch.tensor(scores),
        is_finished=torch.ones(len(scores), dtype=torch.bool),
        is_greedy=torch.tensor(is_greedy),
        groups=torch.tensor(groups),
    )


def test_settings_of_params_yaml_build_it_and_correct_each_token_up_to_two() -> None:
    logprobs, mask = torch.tensor([[-1.0, -1.0]]), torch.tensor([[True, True]])
    sampling = torch.tensor([[-1.0 - math.log(1.5), -4.0]])  # ratios 1.5 and e^3

    inputs = LossInputs(mask, torch.zeros(1), torch.ones(1, 2), sampling, reference_logprobs=logprobs)
    loss, metrics = make("remax").compute_loss(Predictions(logprobs), inputs, Totals(1, 2))

    assert loss.item() == pytest.approx(3.5)  # 1.5 * 1 + 2 * 1; no KL
    assert metrics["learner/importance_weight"].value == pytest.approx(1.75)
    assert metrics["learner/truncated_weight_fraction"].value == 0.5
    assert metrics["learner/advantage"].value == 1.0  # without the weights


def test_one_step_kl_holds_the_states_fixed() -> None:
    """A token pays for its own log-ratio only; full_step also for those after it."""
    logprobs = torch.tensor([[-1.0, -2.0, -4.0]])
    reference = torch.tensor([[-1.5, -1.0, -9.0]])
    mask = torch.tensor([[True, True, False]])

    one_step = kl_cost(logprobs, reference, mask, "one_step")
    full_step = kl_cost(logprobs, reference, mask, "full_step")

    assert one_step.tolist() == [[0.5, -1.0, 0.0]]
    assert full_step.tolist() == [[-0.5, -1.0, 0.0]]
    assert not kl_cost(logprobs.requires_grad_(), reference, mask, "full_step").requires_grad


def test_every_sample_is_measured_against_the_greedy_one_of_its_own_prompt() -> None:
    rollout = make_rollout(
        [False, False, True, False, False, True], [5.0, 1.0, 2.0, 7.0, 3.0, 10.0], [0, 0, 0, 1, 1, 1]
    )

    units, metrics = make("remax", samples_per_prompt=2).select(rollout)

    assert [(unit.rows, unit.advantages) for unit in units] == [
        ((0,), (3.0,)),  # 5 - 2
        ((1,), (-1.0,)),  # 1 - 2
        ((3,), (-3.0,)),  # 7 - 10
        ((4,), (-7.0,)),  # 3 - 10
    ]
    assert metrics["remax/sample_beats_greedy"].value == 0.25
    assert metrics["remax/dropped_prompts"].value == 0.0


def test_a_prompt_whose_greedy_completion_failed_is_dropped_and_counted() -> None:
    rollout = make_rollout([False, True, False, False, True], [5.0, math.nan, 7.0, 3.0, 1.0], [0, 0, 1, 2, 2])

    units, metrics = make("remax").select(rollout)

    assert [(unit.rows, unit.advantages) for unit in units] == [((3,), (2.0,))]
    assert metrics["remax/dropped_prompts"].value == pytest.approx(2 / 3)
    assert make("remax").select(make_rollout([False], [1.0], [0]))[0] == []


def test_a_baseline_that_adds_noise_is_told() -> None:
    algorithm = make("remax")
    helps = {"remax/advantage_variance": Mean(1.0, 1), "remax/score_variance": Mean(2.0, 1)}
    hurts = {"remax/advantage_variance": Mean(3.0, 1), "remax/score_variance": Mean(2.0, 1)}

    assert algorithm.find_trouble(helps) is None
    assert algorithm.find_trouble(hurts) == "the greedy baseline adds noise: advantages vary by 3, scores alone by 2"


@given(constant=st.floats(-100, 100))
def test_adding_a_constant_to_the_reward_model_changes_no_advantage(constant: float) -> None:
    scores, greedy = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 4.0])

    shifted = remax.compute_advantages(scores + constant, greedy + constant)

    torch.testing.assert_close(shifted, remax.compute_advantages(scores, greedy), atol=1e-4, rtol=0)


def test_wrong_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"greedy_scores has shape \(2, 1\), expected \(2,\)"):
        remax.compute_advantages(torch.zeros(2), torch.zeros(2, 1))
