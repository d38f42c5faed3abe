import pytest

from stages.judge.compared_lengths import add_length_control
from stages.judge.compared_run import ComparedRun
from tests.unit.judge.compared import run, sample, verdict_row

NAME = "llm_length_controlled_win_rate"
PROMPTS = [f"p{number}" for number in range(12)]


def judged(number: int, wins: list[float], length: int, rubric: str = "review", **changed: object) -> ComparedRun:
    """Beats an opponent of five characters with completions of a length, on some prompts."""
    return run(
        number,
        judge_model="judge",
        judge_settings=("pairwise", rubric, "0.0"),
        opponent="sft",
        samples={(prompt, 0): sample(prompt, policy="x" * (length + index)) for index, prompt in enumerate(PROMPTS)},
        verdicts={
            (prompt, 0): verdict_row(prompt, win=win, **changed) for prompt, win in zip(PROMPTS, wins, strict=True)
        },
    )


def test_three_runs_with_one_opponent_get_a_rate_at_equal_length() -> None:
    runs = [judged(number, [win] * 12, length=5) for number, win in enumerate((0.75, 0.5, 0.25))]

    found = add_length_control(runs)

    # No prompt differs from another and no length matters, so each has its plain rate.
    assert [item.metrics[NAME] for item in found] == pytest.approx([0.75, 0.5, 0.25], abs=0.01)
    assert all(f"{NAME}_interval_{end}" in item.metrics for item in found for end in ("low", "high"))
    assert [item.metrics["gold_win_rate"] for item in found] == [0.75, 0.75, 0.75]


@pytest.mark.parametrize(
    "runs",
    [
        [judged(number, [1.0, 0.0] * 6, 5) for number in range(2)],
        [judged(number, [1.0, 0.0] * 6, 5, opponent=f"says {number}") for number in range(3)],
        [judged(number, [1.0, 0.0] * 6, 5, rubric=f"rubric_{number}") for number in range(3)],
        [run(number) for number in range(3)],
    ],
    ids=["two runs", "different opponents", "different rubrics", "no LLM judge"],
)
def test_where_there_are_no_instruction_terms_the_runs_stay_as_they_are(runs: list[ComparedRun]) -> None:
    assert add_length_control(runs) == runs
