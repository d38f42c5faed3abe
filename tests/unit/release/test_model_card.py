from typing import Any

import pytest

from stages.models.config import ModelConfig
from stages.release.model_card import render_model_card

MODEL = ModelConfig.model_validate({"source": {"kind": "path", "path": "base"}})


@pytest.mark.parametrize(
    ("metrics", "method"),
    [
        ({"policy": {"samples_total": 64}}, "by reinforcement learning against a reward model."),
        ({"policy": {"samples_total": 64}, "reward": {"kind": "rule"}}, "by reinforcement learning against a rule."),
        ({"policy": {"samples_total": 0}}, "by offline DPO on labelled pairs."),
    ],
)
def test_the_card_names_how_the_policy_was_trained(metrics: dict[str, Any], method: str) -> None:
    assert method in render_model_card(MODEL, params="", metrics=metrics, hashes={}, commit="0123abc")


def test_the_card_says_that_layers_were_left_out() -> None:
    model = MODEL.model_copy(update={"keep_layers": 8})
    card = render_model_card(model, params="", metrics={}, hashes={}, commit="0123abc")

    assert "The model in `base`, 8 of its layers" in card
