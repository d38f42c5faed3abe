from pathlib import Path

import pytest

from stages.common.errors import InputError
from stages.data.rules import write_rule
from stages.scoring.rule import RuleScorer, is_rule
from tests.fakes import make_completion


def test_a_completion_is_right_if_its_last_number_is_its_own_prompts_answer(tmp_path: Path) -> None:
    write_rule(tmp_path, {"p": "72", "q": "-1250.5"})
    completions = [
        make_completion("48 + 24\n#### 72.0"),
        make_completion("#### 7\n#### 72", finished=False),
        make_completion("#### 72\n#### 7"),
        make_completion("72"),
        make_completion("#### -$1,250.50", prompt_id="q"),
        make_completion("#### 72", prompt_id="q"),
    ]

    assert RuleScorer(tmp_path).score(completions) == [1.0, 1.0, 0.0, 0.0, 1.0, 0.0]


def test_a_prompt_without_an_answer_is_named(tmp_path: Path) -> None:
    write_rule(tmp_path, {"p": "72"})

    with pytest.raises(InputError, match=r"rule\.json: has no answer for prompt q; .* run both stages again"):
        RuleScorer(tmp_path).score([make_completion("#### 72", prompt_id="q")])


def test_an_answer_that_is_no_number_is_named(tmp_path: Path) -> None:
    write_rule(tmp_path, {"p": "NaN"})

    with pytest.raises(InputError, match=r"rule\.json: answer of prompt p is 'NaN'; expected a number"):
        RuleScorer(tmp_path)


def test_a_directory_without_a_rule_file_is_no_rule(tmp_path: Path) -> None:
    assert not is_rule(tmp_path)
    assert not is_rule(tmp_path / "missing")

    write_rule(tmp_path, {})

    assert is_rule(tmp_path)
