import math

from stages.common.metrics import Mean, merge_means


def test_means_of_unequal_micro_batches_merge_to_the_mean_of_all() -> None:
    merged = merge_means([{"a": Mean(6.0, 3)}, {"a": Mean(1.0, 1), "b": Mean(5.0, 2)}])

    assert merged["a"].value == 1.75  # (6 + 1) / (3 + 1)
    assert merged["b"].value == 2.5


def test_a_mean_of_nothing_is_not_a_number() -> None:
    assert math.isnan(Mean(0.0, 0).value)
