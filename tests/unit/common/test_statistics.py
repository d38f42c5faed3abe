import numpy as np
import pytest
import scipy.stats

from stages.common.statistics import bootstrap_interval


def test_interval_agrees_with_the_normal_one_where_both_hold() -> None:
    values = np.random.default_rng(0).normal(2.0, 1.0, size=400)

    low, high = bootstrap_interval(values.tolist(), [str(i) for i in range(400)], seed=1)

    half = scipy.stats.norm.ppf(0.975) * values.std() / 20  # 20 = sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.01)


def test_values_of_one_prompt_are_drawn_together() -> None:
    """Ten prompts with ten equal values each know as much as ten values."""
    per_prompt = np.random.default_rng(0).normal(size=10)
    repeated = np.repeat(per_prompt, 10).tolist()

    together = bootstrap_interval(repeated, [str(i // 10) for i in range(100)], seed=1)
    once = bootstrap_interval(per_prompt.tolist(), [str(i) for i in range(10)], seed=1)

    assert together == pytest.approx(once)


def test_the_seed_decides_the_resamples() -> None:
    values, groups = [0.0, 1.0, 0.5, 0.2], ["a", "b", "c", "d"]

    assert bootstrap_interval(values, groups, seed=1) == bootstrap_interval(values, groups, seed=1)
