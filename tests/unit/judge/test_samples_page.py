import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.data.records import Message, Prompt
from stages.judge.evaluate import evaluate_comparison
from stages.judge.samples_page import choose_evenly, escape_markdown, format_value, render_samples
from tests.unit.judge.comparisons import small_comparison

PROMPTS = [Prompt(name, (Message("user", f"Opening of {name} with *stars*"),), "g") for name in ("a", "b")]


def test_page_shows_prompt_both_completions_scores_and_winner() -> None:
    comparison = small_comparison()

    page = render_samples(comparison, evaluate_comparison(comparison, seed=0), PROMPTS, num_shown=5)

    assert "| gold_win_rate | 0.5 |" in page
    assert "> **user**: Opening of a with \\*stars\\*" in page
    assert "| completion | a good film | a great film |" in page
    assert "| gold | 0.100 | 0.500 |" in page
    assert "| proxy | 0.000 | 2.000 |" in page
    assert "## 1. Winner: policy" in page
    assert "## 2. Winner: SFT" in page
    assert "| tokens | 4 | 8 (cut) |" in page
    assert "so \\| bad" in page


@given(st.text())
def test_no_text_breaks_a_table(text: str) -> None:
    escaped = escape_markdown(text)

    assert len(escaped.splitlines()) <= 1
    assert escaped.count("|") == escaped.count("\\|")
    assert "<" not in escaped.replace("<br>", "")


def test_markdown_and_html_are_shown_as_typed() -> None:
    assert escape_markdown("<b>&_x_\nC:\\`") == "&lt;b&gt;&amp;\\_x\\_<br>C:\\\\\\`"


@pytest.mark.parametrize(("num_chosen", "chosen"), [(2, [0, 2]), (9, [0, 1, 2, 3, 4]), (1, [0])])
def test_rows_are_spread_evenly(num_chosen: int, chosen: list[int]) -> None:
    assert choose_evenly([0, 1, 2, 3, 4], num_chosen) == chosen


def test_values_are_readable() -> None:
    assert format_value(0.123456) == "0.1235"
    assert format_value(120) == "120"
    assert format_value([0.25, 0.5]) == "0.25 … 0.5"
    assert format_value(None) == "–"
