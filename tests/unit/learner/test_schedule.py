import pytest

from stages.learner.config import LearnerConfig
from stages.learner.schedule import compute_lr


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_first_and_last_update_have_a_learning_rate_above_zero(schedule: str) -> None:
    config = LearnerConfig(lr=1.0, schedule=schedule, warmup_fraction=0.2)  # type: ignore[arg-type]
    rates = [compute_lr(config, update, 10) for update in range(10)]

    assert min(rates) > 0
    assert rates[2] == 1.0  # two updates of warm-up, then the peak
    assert rates[0] == pytest.approx(1 / 3)


def test_cosine_falls_slowly_at_first_and_constant_not_at_all() -> None:
    rates = {
        schedule: [
            compute_lr(LearnerConfig(lr=1.0, schedule=schedule, warmup_fraction=0.0), update, 4)  # type: ignore[arg-type]
            for update in range(4)
        ]
        for schedule in ("cosine", "constant")
    }

    assert rates["cosine"] == pytest.approx([1.0, 0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5])  # (1 + cos(k * 45°)) / 2
    assert rates["constant"] == [1.0] * 4


def test_linear_decay_reaches_one_step_above_zero() -> None:
    config = LearnerConfig(lr=8.0, schedule="linear", warmup_fraction=0.0)

    assert [compute_lr(config, update, 4) for update in range(4)] == [8.0, 6.0, 4.0, 2.0]
