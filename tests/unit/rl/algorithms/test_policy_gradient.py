import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stages.rl.algorithms.kl import estimate_kl
from stages.rl.algorithms.policy_gradient import (
    Clip,
    Normaliser,
    compute_clipped_terms,
    compute_plain_terms,
    normalise,
)
from stages.rl.records import LossInputs, Predictions, Rollout, Totals
from tests.unit.rl.algorithms.cases import make

MASK = torch.tensor([[True, True], [True, False]])
CLIP = Clip(low=0.2, high=0.3)
TERMS = torch.tensor([[1.0, 3.0], [8.0, 0.0]])
TOTALS = Totals(num_units=2, num_tokens=3)


def make_inputs(sampling: Tensor, proximal: Tensor | None = None) -> LossInputs:
    zeros = torch.zeros(2, 2)
    return LossInputs(MASK, torch.tensor([0, 1]), zeros, sampling, zeros, proximal)


def test_plain_terms_match_hand_computation() -> None:
    logprobs = torch.tensor([[-1.0, -2.0], [-3.0, -9.0]], requires_grad=True)
    sampling = torch.tensor([[-1.0 - math.log(0.5), -2.0 - math.log(4.0)], [-3.0, 5.0]])
    advantages = torch.tensor([[1.0, 1.0], [-2.0, -2.0]], requires_grad=True)

    terms, _ = compute_plain_terms(
        logprobs, advantages, make_inputs(sampling), {"kind": "token_tis", "max_weight": 2.0}
    )
    terms.sum().backward()

    torch.testing.assert_close(terms, torch.tensor([[0.5, 4.0], [-6.0, 0.0]]))  # weights 0.5, 4 -> 2, 1
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, torch.tensor([[-0.5, -2.0], [2.0, 0.0]]))  # -w A
    assert advantages.grad is None


@pytest.mark.parametrize(
    ("ratio", "advantage", "term", "slope"),
    [
        (1.1, 2.0, -2.2, -2.2),  # inside: -A ratio, and d ratio / d log π = ratio
        (1.5, 2.0, -2.6, 0.0),  # above, for the better: worth no more than 1.3
        (0.5, 2.0, -1.0, -1.0),  # below, for the worse: nothing is forgiven
        (0.5, -2.0, 1.6, 0.0),  # below, for the better: worth no more than 0.8
        (1.5, -2.0, 3.0, 3.0),  # above, for the worse
    ],
)
def test_a_clipped_term_pays_no_more_outside_its_range(
    ratio: float, advantage: float, term: float, slope: float
) -> None:
    logprobs = torch.full((2, 2), math.log(ratio), requires_grad=True)
    inputs = make_inputs(torch.zeros(2, 2))

    terms, metrics = compute_clipped_terms(
        logprobs,
        torch.full((2, 2), advantage),
        inputs,
        clip=CLIP,
        level="token",
        correction={"kind": "none", "max_weight": 2.0},
    )
    terms.sum().backward()

    torch.testing.assert_close(terms, torch.where(MASK, term, 0.0))
    torch.testing.assert_close(logprobs.grad, torch.where(MASK, slope, 0.0))
    assert metrics["learner/clipped_fraction"].value == float(slope == 0)


def test_a_sequence_has_one_ratio_and_its_term_once() -> None:
    logprobs = torch.log(torch.tensor([[1.5, 0.8], [1.1, 7.0]]))  # products 1.2 and 1.1
    inputs = make_inputs(torch.zeros(2, 2))

    terms, _ = compute_clipped_terms(
        logprobs,
        torch.tensor([[2.0, 2.0], [-1.0, -1.0]]),
        inputs,
        clip=CLIP,
        level="sequence",
        correction={"kind": "none", "max_weight": 2.0},
    )

    torch.testing.assert_close(terms.sum(dim=1), torch.tensor([-2.4, 1.1]))


def test_the_decoupled_objective_clips_one_ratio_and_weights_by_the_other() -> None:
    proximal = torch.log(torch.tensor([[0.5, 0.5], [0.5, 0.5]]))
    sampling = torch.log(torch.tensor([[0.25, 0.1], [1.0, 1.0]]))  # proximal / sampling = 2, 5 -> 3, 0.5
    logprobs = proximal + math.log(1.1)

    terms, metrics = compute_clipped_terms(
        logprobs,
        torch.ones(2, 2),
        make_inputs(sampling, proximal),
        clip=CLIP,
        level="token",
        correction={"kind": "decoupled", "max_weight": 3.0},
    )

    torch.testing.assert_close(terms, torch.tensor([[-2.2, -3.3], [-0.55, 0.0]]))
    assert metrics["learner/ratio"].value == pytest.approx(1.1)
    assert metrics["learner/importance_weight"].value == pytest.approx((2 + 3 + 0.5) / 3)


def test_the_decoupled_objective_of_sequences_weights_by_the_ratio_of_whole_completions() -> None:
    proximal = torch.log(torch.tensor([[0.5, 0.5], [0.5, 0.5]]))
    sampling = torch.log(torch.tensor([[0.25, 0.1], [1.0, 1.0]]))  # proximal / sampling = 2 * 5 -> 3, 0.5
    logprobs = proximal + math.log(1.1)

    terms, _ = compute_clipped_terms(
        logprobs,
        torch.ones(2, 2),
        make_inputs(sampling, proximal),
        clip=CLIP,
        level="sequence",
        correction={"kind": "decoupled", "max_weight": 3.0},
    )

    torch.testing.assert_close(terms.sum(dim=1), torch.tensor([-1.21 * 3, -1.1 * 0.5]))


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_ratio_that_would_overflow_has_no_gradient_and_is_counted(advantage: float) -> None:
    logprobs = torch.full((2, 2), 200.0, requires_grad=True)

    terms, metrics = compute_clipped_terms(
        logprobs,
        torch.full((2, 2), advantage),
        make_inputs(torch.zeros(2, 2)),
        clip=CLIP,
        level="token",
        correction={"kind": "none", "max_weight": 2.0},
    )
    terms.sum().backward()

    assert terms.isfinite().all()
    torch.testing.assert_close(logprobs.grad, torch.zeros(2, 2))
    assert metrics["learner/clipped_fraction"].value == 1.0


# k1 is log 2, 0 and −log 2. GRPO takes the mean over a completion's tokens: weights 1/4, 1/4 and 1/2.
@pytest.mark.parametrize(
    ("estimator", "values", "slopes"),
    [
        ("k2", (math.log(2) ** 2 / 2, 0.0, math.log(2) ** 2 / 2), (math.log(2), 0.0, -math.log(2))),
        ("k3", (math.log(2) - 0.5, 0.0, 1 - math.log(2)), (0.5, 0.0, -1.0)),
        ("exact", (3.0, 5.0, 7.0), (1.0, 1.0, 1.0)),
    ],
)
def test_the_kl_of_the_loss_matches_hand_computation(
    estimator: str, values: tuple[float, ...], slopes: tuple[float, ...]
) -> None:
    algorithm = make("grpo", kl_loss_coef=0.8, kl_loss_estimator=estimator)
    logprobs = torch.log(torch.tensor([[0.5, 0.25], [0.5, 0.9]])).requires_grad_()
    exact_kl = torch.tensor([[3.0, 5.0], [7.0, 99.0]], requires_grad=True)
    reference = torch.log(torch.tensor([[0.25, 0.25], [1.0, 0.1]]))
    inputs = replace(make_inputs(torch.full((2, 2), -0.3)), reference_logprobs=reference)  # advantages are 0

    loss, _ = algorithm.compute_loss(Predictions(logprobs, exact_kl), inputs, TOTALS)
    loss.backward()

    first, second, third = values
    assert loss.item() == pytest.approx(0.8 * (first / 4 + second / 4 + third / 2))
    source = exact_kl if estimator == "exact" else logprobs
    expected = 0.8 * torch.tensor([[slopes[0] / 4, slopes[1] / 4], [slopes[2] / 2, 0.0]])
    torch.testing.assert_close(source.grad, expected)


def test_the_estimator_of_the_kl_in_the_reward_is_the_one_that_is_set() -> None:
    sampling = torch.log(torch.tensor([[0.5, 0.25], [0.5, 0.9]]))
    reference = torch.log(torch.tensor([[0.25, 0.25], [1.0, 0.1]]))
    inputs = replace(make_inputs(sampling), groups=torch.zeros(2, dtype=torch.long), reference_logprobs=reference)

    charged, _ = make("rloo", samples_per_prompt=2, kl_coef=0.5, kl_estimator="k3").compute_advantages(inputs)

    # KL of the completions: log 2 − 0.5 and 1 − log 2; each is charged half of its own above the other's.
    difference = 0.5 * (2 * math.log(2) - 1.5)
    torch.testing.assert_close(charged.advantages, torch.tensor([[-difference, -difference], [difference, 0.0]]))


def test_the_group_mean_is_taken_from_the_scores_of_its_own_prompt() -> None:
    no = torch.zeros(4, dtype=torch.bool)
    rollout = Rollout(torch.tensor([1.0, 3.0, 10.0, 14.0]), ~no, no, torch.tensor([0, 0, 1, 1]))

    units, _ = make("reinforce_pp", samples_per_prompt=2, baseline="group_mean").select(rollout)

    assert [unit.advantages for unit in units] == [(-1.0,), (1.0,), (-2.0,), (2.0,)]


@pytest.mark.parametrize(
    ("normaliser", "expected"),
    [
        (Normaliser(by="per_sequence", tokens=1.0), 5.0),  # ((1 + 3) / 2 + 8 / 1) / 2
        (Normaliser(by="per_token", tokens=1.0), 4.0),  # (1 + 3 + 8) / 3
        (Normaliser(by="constant", tokens=1.0), 6.0),  # (1 + 3 + 8) / 2
        (Normaliser(by="constant", tokens=4.0), 1.5),  # (1 + 3 + 8) / (2 * 4)
    ],
)
def test_normalisers_match_hand_computation(normaliser: Normaliser, expected: float) -> None:
    assert normalise(TERMS, MASK, TOTALS, normaliser).item() == expected


def test_kl_estimators_match_hand_computation_and_leave_padding_out() -> None:
    logprobs = torch.tensor([[math.log(0.5), -3.0], [-1.0, -400.0]])
    reference = torch.tensor([[math.log(0.25), -3.0], [-1.0, 400.0]])

    # k1 = log 2 at the first token; exp(-k1) - 1 + k1 = 0.5 - 1 + log 2.
    expected = {"k1": math.log(2), "k2": math.log(2) ** 2 / 2, "k3": math.log(2) - 0.5}
    for name, value in expected.items():
        estimate = estimate_kl(logprobs, reference, MASK, name)  # type: ignore[arg-type]
        torch.testing.assert_close(estimate, torch.tensor([[value, 0.0], [0.0, 0.0]]))
