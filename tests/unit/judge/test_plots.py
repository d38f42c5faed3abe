import dataclasses
from pathlib import Path

from stages.judge.evaluate import evaluate_comparison
from stages.judge.plots import average_by_prompt, draw_scores, draw_win_rates, render_csv
from tests.unit.judge.comparisons import completion, scored, small_comparison


def test_rows_average_the_samples_of_a_prompt() -> None:
    items = [completion("a", "x", 1, sample_index=k) for k in range(2)]
    both = scored(items, [1.0, 2.0], [4.0, 6.0])
    comparison = dataclasses.replace(small_comparison(), sft=both, policy=both)

    rows = average_by_prompt(comparison)

    assert render_csv(rows) == (
        "prompt_id,gold_sft,gold_policy,proxy_sft,proxy_policy,kl\na,1.5,1.5,5.0,5.0,2.0\n"  # KL (1 + 3) / 2
    )


def test_a_missing_gold_score_is_an_empty_cell() -> None:
    assert render_csv([{"prompt_id": "a", "gold_sft": None, "kl": 0.5}]) == "prompt_id,gold_sft,kl\na,,0.5\n"


def test_figures_are_drawn_with_and_without_gold(tmp_path: Path) -> None:
    comparison = small_comparison()
    no_gold = dataclasses.replace(
        comparison,
        sft=scored(comparison.sft.completions, None, comparison.sft.proxy),
        policy=scored(comparison.policy.completions, None, comparison.policy.proxy),
    )

    for number, case in enumerate((comparison, no_gold)):
        draw_win_rates(evaluate_comparison(case, seed=0)).savefig(tmp_path / f"wins{number}.png")
        draw_scores(case).savefig(tmp_path / f"scores{number}.png")

    assert len(list(tmp_path.glob("*.png"))) == 4
