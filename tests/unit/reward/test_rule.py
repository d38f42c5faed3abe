from pathlib import Path

import pytest

from stages.data.rules import write_rule
from stages.data.token_pairs import TokenPair
from stages.reward.rule import measure_agreement, publish_rule


def pair(chosen: str, rejected: str) -> TokenPair:
    return TokenPair("p", (1,), (2,), (3,), chosen, rejected)


def test_the_published_rule_agrees_with_a_pair_as_far_as_it_tells_its_sides_apart(tmp_path: Path) -> None:
    data, reward = tmp_path / "data", tmp_path / "reward"
    data.mkdir()
    reward.mkdir()
    write_rule(data, {"p": "72"})

    rule = publish_rule(data, reward)
    right, tie, wrong = pair("#### 72", "#### 7"), pair("#### 5", "#### 7"), pair("#### 5", "#### 72")
    agreement = measure_agreement(rule, [right, right, tie, wrong], seed=0)

    assert (reward / "rule.json").read_bytes() == (data / "rule.json").read_bytes()
    assert agreement is not None
    assert agreement.value == pytest.approx(0.625)  # (1 + 1 + 0.5 + 0) / 4
    assert measure_agreement(rule, [], seed=0) is None
