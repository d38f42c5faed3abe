from pathlib import Path

import pytest

from stages.common.errors import InputError
from stages.data.rules import read_rule, write_rule


def test_a_rule_is_read_back_and_its_bytes_do_not_depend_on_the_order(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    write_rule(tmp_path, {"b": "72", "a": "-0.5"})
    write_rule(tmp_path / "other", {"a": "-0.5", "b": "72"})

    assert read_rule(tmp_path) == {"a": "-0.5", "b": "72"}
    assert (tmp_path / "rule.json").read_bytes() == (tmp_path / "other/rule.json").read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"rule\.json: not valid JSON: "),
        ("[]", r"rule\.json: is \[\]; allowed: \{'format': 1, 'kind': 'exact_answer'\}"),
        ('{"format": 2, "kind": "exact_answer", "answers": {}}', r"rule\.json: is \{'format': 2, .*; allowed: "),
        ('{"format": 1, "kind": "exact_answer"}', r"rule\.json: has no 'answers'; expected an object of numbers"),
        ('{"format": 1, "kind": "exact_answer", "answers": {"a": 72}}', r"rule\.json: has no 'answers'; expected"),
    ],
)
def test_a_damaged_or_newer_rule_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "rule.json").write_text(content)

    with pytest.raises(InputError, match=message):
        read_rule(tmp_path)


def test_a_missing_rule_says_which_command_writes_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"rule\.json: not found; run the stage that writes it"):
        read_rule(tmp_path)
