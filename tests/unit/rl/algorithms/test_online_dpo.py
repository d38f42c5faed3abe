import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.rl.algorithms import online_dpo
from stages.rl.algorithms.online_dpo import OnlineDpo
from stages.rl.records import LossInputs, Predictions, Rollout, Totals
from tests.unit.rl.algorithms.toy import enumerate_completions, toy_logprobs

SIGMOID = OnlineDpo(samples_per_prompt=2, beta=0.1, loss="sigmoid")


def make_inputs(reference: torch.Tensor, mask: torch.Tensor) -> LossInputs:
    zeros = torch.zeros(mask.shape)
    return LossInputs(mask, torch.zeros(len(mask)), zeros, zeros, reference_logprobs=reference)


def test_losses_match_hand_computation() -> None:
    logprobs = torch.tensor([[-1.0, -1.0], [-2.0, -50.0]])
    reference = torch.tensor([[-2.0, -3.0], [-1.0, -70.0]])
    mask = torch.tensor([[True, True], [True, False]])

    delta = online_dpo.compute_delta(logprobs, reference, mask)

    assert delta.tolist() == [4.0]  # chosen (-1+2) + (-1+3) = 3; rejected -2+1 = -1
    sigmoid = online_dpo.compute_loss(delta, beta=0.1, loss="sigmoid", num_pairs=1)
    assert sigmoid.item() == pytest.approx(math.log(1 + math.exp(-0.4)), abs=1e-6)
    ipo = online_dpo.compute_loss(delta, beta=0.1, loss="ipo", num_pairs=1)
    assert ipo.item() == pytest.approx(1.0)  # (4 - 5) squared


def test_expected_gradient_over_all_pairs_is_that_of_the_enumerated_objective() -> None:
    """Every ordered pair of the 15 completions, weighted by its probability, against autograd of the sum."""
    g = torch.Generator().manual_seed(0)
    completions = enumerate_completions()
    table = torch.randn(3, 4, 3, generator=g, dtype=torch.float64, requires_grad=True)
    reference = toy_logprobs(torch.randn(3, 4, 3, generator=g, dtype=torch.float64), completions)
    scores = torch.randn(len(completions.mask), generator=g, dtype=torch.float64)
    sums = torch.where(completions.mask, toy_logprobs(table, completions), 0.0).sum(1)
    ratios = sums - torch.where(completions.mask, reference, 0.0).sum(1)
    weights = sums.detach().exp()

    objective, gradient = torch.zeros((), dtype=torch.float64), torch.zeros_like(table)
    for first in range(len(weights)):
        for second in range(len(weights)):
            if first == second:
                continue
            winner, loser = (first, second) if scores[first] > scores[second] else (second, first)
            weight = weights[first] * weights[second]
            objective = objective - weight * torch.nn.functional.logsigmoid(0.1 * (ratios[winner] - ratios[loser]))
            rollout = Rollout(
                scores=scores[[first, second]],
                is_finished=torch.tensor([True, True]),
                is_greedy=torch.tensor([False, False]),
                groups=torch.tensor([0, 0]),
            )
            (unit,), _ = SIGMOID.select(rollout)
            rows = [(first, second)[row] for row in unit.rows]
            inputs = make_inputs(reference[rows], completions.mask[rows])
            predictions = Predictions(toy_logprobs(table, completions)[rows])
            loss, _ = SIGMOID.compute_loss(predictions, inputs, Totals(1, 0))
            gradient += weight * torch.autograd.grad(loss, table)[0]

    torch.testing.assert_close(gradient, torch.autograd.grad(objective, table)[0], atol=1e-10, rtol=1e-6)


def test_an_unfinished_completion_never_beats_a_finished_one_and_ties_give_no_pair() -> None:
    rollout = Rollout(
        scores=torch.tensor([9.0, 1.0, 2.0, 4.0, 4.0, 4.0]),
        is_finished=torch.tensor([False, True, True, True, True, True]),
        is_greedy=torch.zeros(6, dtype=torch.bool),
        groups=torch.tensor([0, 0, 0, 1, 1, 1]),
    )

    units, metrics = OnlineDpo(samples_per_prompt=3, beta=0.1, loss="sigmoid").select(rollout)

    assert [unit.rows for unit in units] == [(2, 0)]  # the finished 2.0 wins, the cut 9.0 is the worst
    assert metrics["online_dpo/tied_prompts"].value == 0.5


@given(seed=st.integers(0, 2**16), padding=st.integers(1, 4))
def test_padding_changes_nothing(seed: int, padding: int) -> None:
    g = torch.Generator().manual_seed(seed)
    logprobs, reference = -torch.rand(4, 3, generator=g), -torch.rand(4, 3, generator=g)
    mask = torch.rand(4, 3, generator=g) > 0.2
    junk = torch.full((4, padding), -1e9)

    padded = online_dpo.compute_delta(
        torch.cat([logprobs, junk], 1),
        torch.cat([reference, 2 * junk], 1),
        torch.cat([mask, torch.zeros(4, padding, dtype=torch.bool)], 1),
    )

    torch.testing.assert_close(padded, online_dpo.compute_delta(logprobs, reference, mask))


@given(seed=st.integers(0, 2**16), cut=st.integers(0, 3))
def test_micro_batches_add_up_to_the_batch(seed: int, cut: int) -> None:
    g = torch.Generator().manual_seed(seed)
    logprobs, reference, mask = torch.randn(6, 4, generator=g), torch.randn(6, 4, generator=g), torch.ones(6, 4) > 0
    shares = [
        SIGMOID.compute_loss(Predictions(logprobs[rows]), make_inputs(reference[rows], mask[rows]), Totals(3, 0))[0]
        for rows in (slice(None), slice(0, 2 * cut), slice(2 * cut, None))
    ]
    torch.testing.assert_close(shares[1] + shares[2], shares[0])
