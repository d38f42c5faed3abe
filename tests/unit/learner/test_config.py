from typing import Any

import pytest
from pydantic import ValidationError

from stages.learner.config import LearnerConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"zero_stage": 1, "offload_optimizer": "cpu"},
            "learner.offload_optimizer='cpu' with learner.zero_stage=1: it works with stage 2 and 3; set "
            "learner.zero_stage to 2 or learner.offload_optimizer to 'none'",
        ),
        (
            {"zero_stage": 2, "offload_parameters": "cpu"},
            "learner.offload_parameters='cpu' with learner.zero_stage=2: it works with stage 3; set "
            "learner.zero_stage to 3 or learner.offload_parameters to 'none'",
        ),
        (
            {"compile": True, "zero_stage": 3},
            "learner.compile=True with learner.zero_stage=3: it works with stages 0 to 2",
        ),
        ({"num_ranks": 0}, "Input should be greater than 0"),
        ({"lora": {"dropout": 0.1}}, "Extra inputs are not permitted"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        LearnerConfig.model_validate({"lr": 1e-4} | settings)

    assert message in str(caught.value)


def test_stage_three_offloads_both() -> None:
    config = LearnerConfig(lr=1e-4, zero_stage=3, offload_optimizer="cpu", offload_parameters="cpu")

    assert config.lora is None
