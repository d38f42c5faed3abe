import pytest

from stages.judge.compare_figures import (
    Estimate,
    find_alarms,
    find_cautions,
    format_estimate,
    format_number,
    has_alarms,
    read_estimate,
)
from tests.unit.judge.compared import METRICS, run, sample


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.9, "0.900"),
        (3.14159, "3.14"),
        (-0.5, "-0.500"),
        (48.0, "48"),
        (0.0, "0"),
        (123.456, "123"),
        (1e-5, "1.00e-05"),
    ],
)
def test_numbers_have_three_figures_and_counts_none_after_the_point(value: float, text: str) -> None:
    assert format_number(value) == text


def test_an_interval_is_read_beside_its_number() -> None:
    assert read_estimate(METRICS, "gold_win_rate") == Estimate(0.75, 0.7, 0.8)
    assert read_estimate(METRICS, "kl_nats") == Estimate(2.5, None, None)
    assert read_estimate(METRICS, "llm_win_rate") is None
    assert [format_estimate(METRICS, name) for name in ("gold_win_rate", "kl_nats", "llm_win_rate")] == [
        "0.750 (0.700 … 0.800)",
        "2.50",
        "–",
    ]


def test_alarms_are_told_with_their_figures_and_their_absence_is_not_silence() -> None:
    rung = METRICS | {"alarm_proxy_without_gold": 1.0, "alarm_length": 0.0, "proxy_win_rate": 0.9}

    assert find_alarms(rung) == [
        "Proxy up, gold not: proxy win-rate 0.900, gold 0.750 (0.700 … 0.800). "
        "The policy may exploit the reward model; sort the samples by disagreement."
    ]
    assert (has_alarms(rung), has_alarms(METRICS)) == (True, False)


def test_runs_that_cannot_be_compared_are_cautioned_about() -> None:
    same = run(0, opponent="sft", judge_model="m"), run(1, opponent="sft", judge_model="m")
    differs = run(2, opponent="references", judge_model="m", is_dirty=True, samples={("a", 0): sample("a")})

    assert find_cautions(same, num_shared=2) == []
    prompts, judges, changed = find_cautions([*same, differs], num_shared=1)
    assert "they share 1 samples, of 2, 2, 1" in prompts
    judge = "m (pairwise, review, temperature 0.0)"
    assert f"{judge} against sft, {judge} against references" in judges
    assert changed == "Files differed from the commit: pipeline-2."


def test_another_rubric_and_another_sft_model_are_cautioned_about() -> None:
    first = run(0, opponent="sft", judge_model="m")
    rubric = run(1, opponent="sft", judge_model="m", judge_settings=("single", "instruction", "0.0"))
    parent = run(2, samples={("a", 0): sample("a"), ("b", 0): sample("b", sft="another answer")})

    (judges,) = find_cautions([first, rubric], num_shared=2)
    assert "m (single, instruction, temperature 0.0) against sft" in judges
    (parents,) = find_cautions([first, parent], num_shared=2)
    assert parents.startswith("The SFT model answered differently")
