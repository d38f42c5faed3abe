import dataclasses
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.judge.comparison import Comparison
from stages.judge.pass_rate import estimate_pass_at_k, measure_pass_rates
from tests.unit.judge.comparisons import completion, scored


@given(verdicts=st.lists(st.booleans(), min_size=1, max_size=8), data=st.data())
def test_pass_at_k_is_the_share_of_all_choices_of_k_that_hold_a_right_one(
    verdicts: list[bool], data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, len(verdicts)))
    choices = [any(choice) for choice in combinations(verdicts, k)]

    estimate = estimate_pass_at_k(len(verdicts), sum(verdicts), k)

    assert estimate == pytest.approx(sum(choices) / len(choices))


@pytest.mark.parametrize(("num_samples", "num_correct", "k"), [(3, 1, 4), (3, 1, 0), (3, 4, 1), (3, -1, 1)])
def test_more_choices_than_samples_are_refused(num_samples: int, num_correct: int, k: int) -> None:
    with pytest.raises(ValueError, match=rf"k={k} and num_correct={num_correct} .* allowed: 1 … 3 for k"):
        estimate_pass_at_k(num_samples, num_correct, k)


def compare(sft: list[list[float]], policy: list[list[float]]) -> Comparison:
    """Prompts p0, p1, … with the gold scores given."""
    samples = []
    for model in (sft, policy):
        items = [
            completion(f"p{prompt}", "", 1, sample_index=index, finished=index % 2 == 0)
            for prompt, scores in enumerate(model)
            for index in range(len(scores))
        ]
        gold = [score for scores in model for score in scores]
        samples.append(scored(items, gold, gold, nll=[1.0] * len(items)))
    nothing = [0.0] * len(samples[1].completions)
    return Comparison(samples[0], samples[1], nothing, nothing)


def test_every_k_up_to_the_samples_of_a_prompt_is_reported_with_its_interval() -> None:
    metrics = measure_pass_rates(compare([[0, 0, 0], [1, 0, 0]], [[1, 1, 0], [1, 1, 1]]), seed=0)

    rates = {name: value for name, value in metrics.items() if not name.endswith("interval")}
    assert rates == pytest.approx({
        "pass_at_1_sft": 1 / 6,  # (0 + 1/3) / 2
        "pass_at_1_policy": 5 / 6,  # (2/3 + 1) / 2
        "pass_at_2_sft": 1 / 3,  # of the second prompt's three pairs, two hold the right one
        "pass_at_2_policy": 1.0,
        "pass_at_3_sft": 0.5,
        "pass_at_3_policy": 1.0,
    })  # fmt: skip
    assert metrics["pass_at_1_sft_interval"] == pytest.approx([0.0, 1 / 3])  # two prompts, drawn again
    assert metrics["pass_at_3_policy_interval"] == [1.0, 1.0]
    assert len(metrics) == 12


def test_pass_at_1_is_the_mean_score() -> None:
    comparison = compare([[0, 1], [1, 1], [0, 0]], [[1, 0], [0, 0], [0, 0]])

    metrics = measure_pass_rates(comparison, seed=0)

    assert (metrics["pass_at_1_sft"], metrics["pass_at_1_policy"]) == pytest.approx((3 / 6, 1 / 6))
    swapped = dataclasses.replace(comparison, sft=comparison.policy, policy=comparison.sft)
    assert measure_pass_rates(swapped, seed=0)["pass_at_1_sft"] == metrics["pass_at_1_policy"]
