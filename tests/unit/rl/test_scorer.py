import math
from dataclasses import replace

import pytest

from stages.common.errors import RunError, SettingError
from stages.rl.scorer import resolve_missing_eos_score, score_completions
from tests.fakes import FakeScorer, make_completion


def test_lowest_is_the_lowest_score_of_sft_samples() -> None:
    assert resolve_missing_eos_score("lowest", (-3.5, 4.0)) == -3.5
    assert resolve_missing_eos_score(-9.0, (-3.5, 4.0)) == -9.0


def test_a_score_that_would_reward_never_stopping_is_refused() -> None:
    with pytest.raises(SettingError, match=r"rl.missing_eos_score=-1.0 is above -3.500"):
        resolve_missing_eos_score(-1.0, (-3.5, 4.0))


def test_only_unfinished_completions_lose_their_score() -> None:
    completions = [make_completion("a", finished=True), make_completion("b", finished=False)]

    assert score_completions(FakeScorer([7.0, 8.0]), completions, missing_eos_score=-2.0) == [7.0, -2.0]


def test_a_greedy_completion_that_was_cut_on_purpose_keeps_its_score() -> None:
    cut = replace(make_completion("x", finished=False, token_ids=(5, 6, 7)), is_greedy=True)
    sampled = replace(cut, is_greedy=False)
    shorter = replace(cut, token_ids=(5, 6))

    scores = score_completions(FakeScorer([1.0, 2.0, 3.0]), [cut, sampled, shorter], -9.0, greedy_max_tokens=3)

    assert scores == [1.0, -9.0, -9.0]


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_a_sample_without_a_finite_score_ends_the_run_and_is_named(score: float) -> None:
    completions = [make_completion("a", finished=True), make_completion("b", finished=True)]

    with pytest.raises(RunError, match=rf"prompt '.*', sample \d: the reward model's score is {score}; allowed: a fin"):
        score_completions(FakeScorer([1.0, score]), completions, -2.0)


def test_a_greedy_completion_may_be_without_a_score() -> None:
    greedy = replace(make_completion("x", finished=True), is_greedy=True)

    assert math.isnan(score_completions(FakeScorer([math.nan]), [greedy], -2.0)[0])
