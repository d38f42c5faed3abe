import pytest

from stages.common.progress import describe, progress


def test_every_item_is_yielded_once() -> None:
    assert list(progress("abc", "letters")) == ["a", "b", "c"]
    assert list(progress(3, "counts")) == [0, 1, 2]


def test_a_log_gets_few_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")

    list(progress(100_000, "fast"))

    assert len(caplog.records) < 5


def test_a_line_says_how_far_how_fast_and_how_long_still() -> None:
    line = describe("train", 30, 120, unit="step", elapsed_s=60.0)

    assert line == "train steps=30/120 steps_per_s=0.5 left_s=180"  # (120 - 30) / 0.5
