import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stages.rl.algorithms import remax
from stages.rl.algorithms.importance import Correction, CorrectionKind
from stages.rl.algorithms.remax import Remax
from stages.rl.config import RemaxConfig
from stages.rl.records import LossInputs, Rollout
from tests.unit.rl.algorithms.toy import enumerate_completions, greedy_completion, toy_logprobs

MASK = torch.tensor([[True, True], [True, False]])
ONES = torch.ones(2, 2)
NO_CORRECTION = Correction(kind="none", max_weight=2.0)
NO_BOUND = 1e6


@dataclass(frozen=True)
class Toy:
    """A reward, a reference and a learner over the toy vocabulary. B = 15, T = 3."""

    table: Tensor  # the learner's logits, with gradient
    reference: Tensor  # [B, T]
    scores: Tensor  # [B]

    def compute_exact_gradient(self, kl_coef: float) -> Tensor:
        """d E[score - kl_coef KL] / d table, by autograd of the sum over all completions."""
        completions = enumerate_completions()
        per_token = torch.where(completions.mask, toy_logprobs(self.table, completions), 0.0)
        probabilities = per_token.sum(1).exp()
        torch.testing.assert_close(probabilities.sum(), torch.tensor(1.0, dtype=torch.float64))
        log_ratios = torch.where(completions.mask, per_token - self.reference, 0.0).sum(1)
        objective = (probabilities * (self.scores - kl_coef * log_ratios)).sum()
        return torch.autograd.grad(objective, self.table)[0]

    def compute_expected_gradient(self, algorithm: Remax, sampling_table: Tensor) -> Tensor:
        """-gradient of the loss of one sample and its greedy completion, over all samples with their probabilities."""
        completions = enumerate_completions()
        sampling = toy_logprobs(sampling_table.detach(), completions)
        greedy = greedy_completion(sampling_table, completions)
        expected = torch.zeros_like(self.table)
        for row, probability in enumerate(torch.where(completions.mask, sampling, 0.0).sum(1).exp().tolist()):
            rollout = Rollout(
                scores=torch.stack([self.scores[row], self.scores[greedy]]),
                is_finished=torch.tensor([True, True]),
                is_greedy=torch.tensor([False, True]),
                groups=torch.tensor([0, 0]),
            )
            (unit,), _ = algorithm.select(rollout)
            inputs = LossInputs(
                completion_mask=completions.mask[row : row + 1],
                advantages=torch.full((1, 3), unit.advantages[0], dtype=torch.float64),
                sampling_logprobs=sampling[row : row + 1],
                reference_logprobs=self.reference[row : row + 1],
            )
            logprobs = toy_logprobs(self.table, completions)[row : row + 1]
            loss, _ = algorithm.compute_loss(logprobs, inputs, num_units=1)
            expected -= probability * torch.autograd.grad(loss, self.table)[0]
        return expected


def make_toy(seed: int) -> tuple[Toy, Tensor]:
    """And the logits of an older policy."""
    g = torch.Generator().manual_seed(seed)
    completions = enumerate_completions()
    table, reference, old_table = (torch.randn(3, 4, 3, generator=g, dtype=torch.float64) for _ in range(3))
    scores = torch.randn(len(completions.mask), generator=g, dtype=torch.float64)
    return Toy(table.requires_grad_(), toy_logprobs(reference, completions), scores), old_table


def make_remax(kl_mode: str, correction: Correction) -> Remax:
    kl_coef = 0.0 if kl_mode == "none" else 0.3
    return Remax(samples_per_prompt=1, kl_coef=kl_coef, kl_mode=kl_mode, correction=correction)  # type: ignore[arg-type]


def test_loss_matches_hand_computation() -> None:
    logprobs = torch.tensor([[-1.0, -2.0], [-3.0, -9.0]])
    scores = remax.compute_advantages(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 3.0]))  # [1, -2]
    loss, _ = remax.compute_loss(logprobs, scores[:, None].expand(-1, 2), ONES, MASK, num_completions=2)
    torch.testing.assert_close(loss, torch.tensor(-1.5))  # (1*1 + 1*2 - 2*3) / 2; -9 is padding


def test_a_weight_multiplies_its_token_and_takes_no_gradient() -> None:
    logprobs = torch.tensor([[-1.0, -2.0], [-3.0, -9.0]], requires_grad=True)
    weights = torch.tensor([[0.5, 2.0], [1.5, 7.0]], requires_grad=True)
    advantages = torch.tensor([[1.0, 1.0], [-2.0, -2.0]])

    loss, _ = remax.compute_loss(logprobs, advantages, weights, MASK, num_completions=2)
    loss.backward()

    assert loss.item() == -2.25  # (0.5*1 + 2*2 - 2*1.5*3) / 2
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [[-0.25, -1.0], [1.5, 0.0]]  # -weight * advantage / 2
    assert weights.grad is None


@pytest.mark.parametrize("kind", ["none", "token_tis", "sequence_tis"])
@pytest.mark.parametrize("kl_mode", ["none", "full_step"])
@pytest.mark.parametrize("seed", range(3))
def test_expected_gradient_is_the_exact_policy_gradient(kl_mode: str, kind: CorrectionKind, seed: int) -> None:
    """Of samples of the learner itself, with any correction."""
    toy, _ = make_toy(seed)
    algorithm = make_remax(kl_mode, Correction(kind=kind, max_weight=2.0))

    expected = toy.compute_expected_gradient(algorithm, sampling_table=toy.table)

    torch.testing.assert_close(expected, toy.compute_exact_gradient(algorithm.kl_coef), atol=1e-10, rtol=1e-6)


@pytest.mark.parametrize("kl_mode", ["none", "full_step"])
@pytest.mark.parametrize("seed", range(3))
def test_untruncated_sequence_weights_of_stale_samples_give_the_exact_policy_gradient(kl_mode: str, seed: int) -> None:
    """Also where an older policy sampled, greedy completion included; no other correction does."""
    toy, old_table = make_toy(seed)
    exact = toy.compute_exact_gradient(0.0 if kl_mode == "none" else 0.3)

    def compute_error(kind: CorrectionKind, max_weight: float) -> float:
        algorithm = make_remax(kl_mode, Correction(kind=kind, max_weight=max_weight))
        return float((toy.compute_expected_gradient(algorithm, old_table) - exact).norm() / exact.norm())

    assert compute_error("sequence_tis", NO_BOUND) < 1e-9
    assert compute_error("none", NO_BOUND) > 0.1
    assert compute_error("token_tis", NO_BOUND) > 0.1
    assert compute_error("sequence_tis", 1.0) > 0.1


def test_settings_of_params_yaml_build_it_and_correct_each_token_up_to_two() -> None:
    algorithm = Remax(**RemaxConfig(name="remax").model_dump(exclude={"name"}))
    logprobs, mask = torch.tensor([[-1.0, -1.0]]), torch.tensor([[True, True]])
    sampling = torch.tensor([[-1.0 - math.log(1.5), -4.0]])  # ratios 1.5 and e^3

    inputs = LossInputs(mask, advantages=torch.ones(1, 2), sampling_logprobs=sampling, reference_logprobs=logprobs)
    loss, metrics = algorithm.compute_loss(logprobs, inputs, num_units=1)

    assert loss.item() == pytest.approx(3.5)  # 1.5 * 1 + 2 * 1; no KL
    assert metrics["learner/importance_weight"].value == pytest.approx(1.75)
    assert metrics["learner/truncated_weight_fraction"].value == 0.5
    assert metrics["learner/advantage"].value == 1.0  # without the weights


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

    units, metrics = Remax(samples_per_prompt=2, kl_coef=0.0, kl_mode="none", correction=NO_CORRECTION).select(rollout)

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
    parts = [torch.randn(6, 5, generator=g), torch.randn(6, 5, generator=g), torch.rand(6, 5, generator=g)]
    batch = *parts, torch.rand(6, 5, generator=g) > 0.3
    whole, _ = remax.compute_loss(*batch, num_completions=6)
    head, _ = remax.compute_loss(*(x[:cut] for x in batch), num_completions=6)
    tail, _ = remax.compute_loss(*(x[cut:] for x in batch), num_completions=6)
    torch.testing.assert_close(head + tail, whole)


def test_wrong_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"advantages has shape \(2, 1\), expected \(2, 2\)"):
        remax.compute_loss(torch.zeros(2, 2), torch.zeros(2, 1), ONES, MASK, num_completions=2)
    with pytest.raises(ValueError, match=r"weights has shape \(2, 1\), expected \(2, 2\)"):
        remax.compute_loss(torch.zeros(2, 2), torch.zeros(2, 2), torch.ones(2, 1), MASK, num_completions=2)
