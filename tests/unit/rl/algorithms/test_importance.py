import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from stages.common.metrics import merge_means
from stages.rl.algorithm_config import CorrectionConfig
from stages.rl.algorithms.importance import CorrectionKind, compute_importance_weights

KINDS = st.sampled_from(["none", "token_tis", "sequence_tis"])
BOUNDS = st.floats(1, 1e6)


def make_batch(seed: int, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of two policies and a mask of right-padded completions. [6, 5] each"""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (6, 1), generator=g)
    logprobs, sampling = -scale * torch.rand(6, 5, generator=g), -scale * torch.rand(6, 5, generator=g)
    return logprobs, sampling, torch.arange(5) < lengths


@pytest.mark.parametrize(
    ("kind", "expected", "mean", "truncated"),
    [
        ("none", [[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]], 1.0, 0.0),
        ("token_tis", [[1.5, 0.5, 2.0], [2.0, 0.0, 0.0]], 1.5, 0.5),
        # First completion: 1.5 * 0.5 * 2.4 = 1.8; second: 4, cut to 2.
        ("sequence_tis", [[1.8, 1.8, 1.8], [2.0, 0.0, 0.0]], 1.85, 0.25),
    ],
)
def test_weights_match_hand_computation(
    kind: CorrectionKind, expected: list[list[float]], mean: float, truncated: float
) -> None:
    ratios = torch.tensor([[1.5, 0.5, 2.4], [4.0, 9.0, 9.0]])  # the nines are padding
    sampling = torch.full((2, 3), -3.0)
    mask = torch.tensor([[True, True, True], [True, False, False]])

    weights, metrics = compute_importance_weights(sampling + ratios.log(), sampling, mask, kind=kind, max_weight=2.0)

    torch.testing.assert_close(weights, torch.tensor(expected))
    assert metrics["learner/importance_weight"].value == pytest.approx(mean)
    assert metrics["learner/truncated_weight_fraction"].value == truncated


@given(seed=st.integers(0, 2**16), kind=KINDS, max_weight=BOUNDS, scale=st.sampled_from([0.1, 5.0, 1e4]))
def test_a_weight_is_from_zero_to_the_bound_whatever_the_ratio(
    seed: int, kind: CorrectionKind, max_weight: float, scale: float
) -> None:
    """Ratios of e^10000 included, which exp alone cannot hold."""
    weights, _ = compute_importance_weights(*make_batch(seed, scale), kind=kind, max_weight=max_weight)

    assert weights.isfinite().all()
    assert (weights >= 0).all()
    assert (weights <= torch.tensor(max_weight)).all()


@given(seed=st.integers(0, 2**16), kind=KINDS, max_weight=BOUNDS)
def test_equal_logprobs_weigh_exactly_one_and_none_is_truncated(
    seed: int, kind: CorrectionKind, max_weight: float
) -> None:
    logprobs, _, mask = make_batch(seed)

    weights, metrics = compute_importance_weights(logprobs, logprobs.clone(), mask, kind=kind, max_weight=max_weight)

    assert weights[mask].tolist() == [1.0] * int(mask.sum())
    assert metrics["learner/importance_weight"].value == 1.0
    assert metrics["learner/truncated_weight_fraction"].value == 0.0


@given(seed=st.integers(0, 2**16), kind=KINDS, junk=st.sampled_from([-1e9, math.inf, math.nan]))
def test_padding_changes_nothing(seed: int, kind: CorrectionKind, junk: float) -> None:
    logprobs, sampling, mask = make_batch(seed)
    padded = torch.where(mask, logprobs, junk), torch.where(mask, sampling, -junk), mask

    weights, metrics = compute_importance_weights(logprobs, sampling, mask, kind=kind, max_weight=2.0)
    same_weights, same_metrics = compute_importance_weights(*padded, kind=kind, max_weight=2.0)

    assert (weights[~mask] == 0).all()
    assert torch.equal(weights, same_weights)
    assert metrics == same_metrics


@given(seed=st.integers(0, 2**16), kind=KINDS, cut=st.integers(0, 6))
def test_micro_batches_add_up_to_the_batch(seed: int, kind: CorrectionKind, cut: int) -> None:
    batch = make_batch(seed)
    whole, metrics = compute_importance_weights(*batch, kind=kind, max_weight=1.2)
    parts = [
        compute_importance_weights(*(tensor[rows] for tensor in batch), kind=kind, max_weight=1.2)
        for rows in (slice(0, cut), slice(cut, None))
    ]

    assert torch.equal(torch.cat([weights for weights, _ in parts]), whole)
    merged = merge_means(part_metrics for _, part_metrics in parts)
    assert {name: mean.value for name, mean in merged.items()} == pytest.approx(
        {name: mean.value for name, mean in metrics.items()}
    )


def test_weights_carry_no_gradient() -> None:
    logprobs, sampling, mask = make_batch(0)
    weights, _ = compute_importance_weights(
        logprobs.requires_grad_(), sampling, mask, kind="sequence_tis", max_weight=2.0
    )
    assert not weights.requires_grad


def test_wrong_shape_and_wrong_bound_are_named() -> None:
    zeros, mask = torch.zeros(2, 2), torch.ones(2, 2) > 0
    with pytest.raises(ValueError, match=r"sampling_logprobs has shape \(2, 1\), expected \(2, 2\)"):
        compute_importance_weights(zeros, torch.zeros(2, 1), mask, kind="token_tis", max_weight=2.0)
    with pytest.raises(ValueError, match=r"max_weight=0.5: allowed: from 1 to 1e\+06"):
        compute_importance_weights(zeros, zeros, mask, kind="token_tis", max_weight=0.5)


@pytest.mark.parametrize("max_weight", [0.99, 1e7, math.inf, math.nan])
def test_settings_refuse_a_bound_below_one_or_without_end(max_weight: float) -> None:
    with pytest.raises(ValidationError, match="max_weight"):
        CorrectionConfig(max_weight=max_weight)
