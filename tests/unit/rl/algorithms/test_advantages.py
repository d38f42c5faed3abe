import math

import pytest
import torch

from stages.rl.algorithms import advantages
from stages.rl.records import LossInputs, Rollout
from tests.unit.rl.algorithms.cases import make

GROUPS = torch.tensor([7, 7, 7, 2, 2])
VALUES = torch.tensor([1.0, 2.0, 6.0, 10.0, 4.0])
MASK = torch.tensor([[True, True], [True, False]])


def make_rollout(scores: list[float], groups: list[int]) -> Rollout:
    return Rollout(
        scores=torch.tensor(scores),
        is_finished=torch.ones(len(scores), dtype=torch.bool),
        is_greedy=torch.zeros(len(scores), dtype=torch.bool),
        groups=torch.tensor(groups),
    )


def weights_of(name: str, scores: list[float], groups: list[int], **options: object) -> list[float]:
    units, _ = make(name, **options).select(make_rollout(scores, groups))
    return [value for unit in units for value in unit.advantages]


def test_baselines_match_hand_computation() -> None:
    assert advantages.group_mean(VALUES, GROUPS).tolist() == [3.0, 3.0, 3.0, 7.0, 7.0]
    assert advantages.leave_one_out(VALUES, GROUPS).tolist() == [4.0, 3.5, 1.5, 4.0, 10.0]
    assert advantages.mean_of_other_groups(VALUES, GROUPS).tolist() == [7.0, 7.0, 7.0, 3.0, 3.0]
    spread = [math.sqrt((4 + 1 + 9) / 2)] * 3 + [math.sqrt(18)] * 2
    torch.testing.assert_close(advantages.group_std(VALUES, GROUPS), torch.tensor(spread))


def test_a_single_sample_has_no_others() -> None:
    with pytest.raises(ValueError, match="at least 2 samples of each prompt"):
        advantages.leave_one_out(VALUES, torch.tensor([0, 0, 0, 0, 1]))
    assert advantages.mean_of_other_groups(VALUES, torch.zeros(5)).tolist() == [0.0] * 5


def test_rloo_and_grpo_and_reinforce_weigh_scores_as_their_papers_say() -> None:
    scores, groups = [1.0, 3.0, 5.0, 5.0], [0, 0, 1, 1]

    assert weights_of("rloo", scores, groups, samples_per_prompt=2) == [-2.0, 2.0, 0.0, 0.0]
    assert weights_of("grpo", scores, groups, scale="none") == [-1.0, 1.0, 0.0, 0.0]
    root = math.sqrt(2)  # of the first group, with n - 1
    assert weights_of("grpo", scores, groups) == pytest.approx([-1 / (root + 1e-4), 1 / (root + 1e-4), 0, 0])
    assert weights_of("reinforce", scores, groups) == [-4.0, -2.0, 3.0, 3.0]
    assert weights_of("reinforce", scores, groups, baseline="none") == scores


def test_rloo_charges_the_kl_of_whole_completions_against_that_of_the_others() -> None:
    inputs = LossInputs(
        MASK,
        groups=torch.tensor([3, 3]),
        advantages=torch.where(MASK, torch.tensor([[2.0], [-2.0]]), 0.0),
        sampling_logprobs=torch.tensor([[-1.0, -2.0], [-1.0, -7.0]]),
        reference_logprobs=torch.tensor([[-2.0, -4.0], [-1.5, -9.0]]),
    )

    shaped, _ = make("rloo", kl_coef=0.1).compute_advantages(inputs)

    # KL 3 and 0.5, so the first loses 0.1 * (3 - 0.5) and the second gains it.
    torch.testing.assert_close(shaped.advantages, torch.tensor([[1.75, 1.75], [-1.75, 0.0]]))


def test_reinforce_pp_whitens_returns_over_all_tokens() -> None:
    inputs = LossInputs(
        MASK,
        groups=torch.tensor([0, 1]),
        advantages=torch.where(MASK, torch.tensor([[4.0], [1.0]]), 0.0),
        sampling_logprobs=torch.tensor([[-1.0, -2.0], [-1.0, -7.0]]),
        reference_logprobs=torch.tensor([[-2.0, -4.0], [-1.0, -9.0]]),
    )

    shaped, _ = make("reinforce_pp", kl_coef=1.0).compute_advantages(inputs)

    # Returns 4 - (1 + 2) = 1, 4 - 2 = 2 and 1: mean 4/3, variance 2/9.
    expected = torch.tensor([[-1 / 3, 2 / 3], [-1 / 3, 0.0]]) / math.sqrt(2 / 9)
    torch.testing.assert_close(shaped.advantages, expected)


@pytest.mark.parametrize("value", [-4.4, -3.217, 1.9])
def test_whitening_equal_returns_makes_nothing_of_rounding(value: float) -> None:
    returns = torch.full((64, 48), value)

    assert advantages.whiten(returns, torch.ones_like(returns, dtype=torch.bool)).eq(0).all()


def test_a_number_is_put_at_the_last_token() -> None:
    placed = advantages.put_at_end(torch.tensor([5.0, 7.0]), MASK)

    assert placed.tolist() == [[0.0, 5.0], [7.0, 0.0]]
