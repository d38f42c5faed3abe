"""Estimators whose expectation is the gradient of E[score − kl_coef · KL], by enumerating every outcome."""

from typing import Any

import pytest
import torch

from tests.unit.rl.algorithms.cases import make
from tests.unit.rl.algorithms.toy import make_toy

KL = 0.3
NO_BOUND = 1e6
UNBIASED: list[tuple[str, dict[str, Any]]] = [
    ("reinforce", {"kl_coef": KL}),
    ("remax", {"kl_coef": KL}),
    ("remax", {"kl_coef": 0, "kl_mode": "none"}),
    ("rloo", {"kl_coef": KL, "samples_per_prompt": 2}),
    ("rloo", {"kl_coef": 0, "samples_per_prompt": 2}),
]


def untruncated(kind: str) -> dict[str, Any]:
    return {"correction": {"kind": kind} if kind == "none" else {"kind": kind, "max_weight": NO_BOUND}}


@pytest.mark.parametrize("kind", ["none", "token_tis", "sequence_tis"])
@pytest.mark.parametrize(("name", "options"), UNBIASED)
def test_of_its_own_samples_the_expected_gradient_is_exact(name: str, options: dict[str, Any], kind: str) -> None:
    toy, _ = make_toy(0)
    algorithm = make(name, **options, correction={"kind": kind})

    expected = toy.compute_expected_gradient(algorithm, sampling_table=toy.table)

    torch.testing.assert_close(expected, toy.compute_exact_gradient(options["kl_coef"]), atol=1e-9, rtol=1e-6)


def test_the_mean_of_other_prompts_is_an_unbiased_baseline_and_that_of_the_group_shrinks_the_gradient() -> None:
    """Dr. GRPO's baseline holds the sample itself: (K − 1)/K of the gradient."""
    toy, _ = make_toy(4)
    exact = toy.compute_exact_gradient(0.0)
    dr_grpo = {"scale": "none", "kl_loss_coef": 0, "normaliser": {"by": "constant"}, "samples_per_prompt": 2}

    of_others = toy.compute_expected_gradient(make("reinforce", kl_coef=0, kl_mode="none"), toy.table, num_prompts=2)
    of_group = toy.compute_expected_gradient(make("grpo", **dr_grpo), toy.table)

    torch.testing.assert_close(of_others, exact, atol=1e-9, rtol=1e-6)
    torch.testing.assert_close(of_group, exact / 2, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize(("name", "options"), UNBIASED[:3])
@pytest.mark.parametrize("seed", range(2))
def test_of_stale_samples_only_untruncated_sequence_weights_keep_it_exact(
    name: str, options: dict[str, Any], seed: int
) -> None:
    toy, old_table = make_toy(seed)
    exact = toy.compute_exact_gradient(options["kl_coef"])

    def compute_error(correction: dict[str, Any]) -> float:
        expected = toy.compute_expected_gradient(make(name, **options, **correction), old_table)
        return float((expected - exact).norm() / exact.norm())

    assert compute_error(untruncated("sequence_tis")) < 1e-9
    assert compute_error(untruncated("none")) > 0.05
    assert compute_error(untruncated("token_tis")) > 0.05
    assert compute_error({"correction": {"kind": "sequence_tis", "max_weight": 1.0}}) > 0.05


def test_leave_one_out_of_stale_samples_is_biased_even_with_sequence_weights() -> None:
    """The baseline is the mean of unweighted stale scores: no bias from it. The KL is the sampling policy's: bias."""
    toy, old_table = make_toy(1)

    def compute_error(kl_coef: float) -> float:
        algorithm = make("rloo", kl_coef=kl_coef, samples_per_prompt=2, **untruncated("sequence_tis"))
        exact = toy.compute_exact_gradient(kl_coef)
        return float((toy.compute_expected_gradient(algorithm, old_table) - exact).norm() / exact.norm())

    assert compute_error(0.0) < 1e-9
    assert compute_error(KL) > 0.05


def test_one_step_kl_is_not_the_gradient_of_the_kl_of_completions() -> None:
    toy, _ = make_toy(2)
    expected = toy.compute_expected_gradient(make("remax", kl_coef=KL, kl_mode="one_step"), toy.table)
    exact = toy.compute_exact_gradient(KL)

    assert (expected - exact).norm() / exact.norm() > 0.01


def test_contrastive_gradient_of_its_own_samples_is_twice_the_exact_one() -> None:
    """A pair counts for both its members."""
    toy, _ = make_toy(3)

    expected = toy.compute_expected_gradient(make("copg", beta=KL, samples_per_prompt=2), toy.table)

    torch.testing.assert_close(expected, 2 * toy.compute_exact_gradient(KL), atol=1e-9, rtol=1e-6)
