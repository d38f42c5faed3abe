import json
import threading
import time
from pathlib import Path

import pytest

from stages.rl.timeline import Span, Timeline, read_spans, summarise_timeline, union_s
from stages.rl.timeline_figure import COLORS, draw_timeline, select_window


def steady_run(num_updates: int) -> list[Span]:
    """Updates of 10 seconds: the learner waits for 4 and learns for 6; generators are busy for 10, 5 and 1."""
    spans = []
    for version in range(num_updates):
        start = 10.0 * version
        spans += [
            Span("learner", "wait", start, start + 4, version),
            Span("learner", "learn", start + 4, start + 10, version),
            Span("generator-0", "generate", start, start + 10, version),
            Span("generator-10", "generate", start, start + 5, version),
            Span("generator-2", "swap", start, start + 1, version),
        ]
    return spans


def test_spans_of_two_threads_are_all_counted_and_written(tmp_path: Path) -> None:
    timeline = Timeline(tmp_path / "timeline.jsonl")

    def record(role: str, kind: str) -> None:
        for version in range(1500):
            timeline.add(role, kind, 100.0 + version, 100.5 + version, version)

    other = threading.Thread(target=record, args=("generator-0", "generate"))
    other.start()
    record("learner", "learn")
    other.join()
    timeline.flush()

    assert timeline.totals() == {("learner", "learn"): 750.0, ("generator-0", "generate"): 750.0}  # 1500 * 0.5
    for role in ("learner", "generator-0"):
        versions = [span.policy_version for span in read_spans(tmp_path / "timeline.jsonl") if span.role == role]
        assert versions == list(range(1500))


def test_seconds_count_from_the_start_of_the_run(tmp_path: Path) -> None:
    timeline = Timeline(tmp_path / "timeline.jsonl", offset_s=40.0)
    started = time.monotonic()
    timeline.add("learner", "learn", started, started + 2.0, 3)
    timeline.flush()

    (span,) = read_spans(tmp_path / "timeline.jsonl")

    assert span.end_s - span.start_s == pytest.approx(2.0, abs=1e-5)
    assert 40.0 <= span.start_s <= timeline.elapsed_s < 100.0
    assert (span.role, span.kind, span.policy_version) == ("learner", "learn", 3)


def test_a_block_that_raises_is_recorded(tmp_path: Path) -> None:
    timeline = Timeline(tmp_path / "timeline.jsonl")

    with pytest.raises(KeyError), timeline.span("generator-0", "swap", 1):
        raise KeyError

    assert list(timeline.totals()) == [("generator-0", "swap")]


def test_a_resume_goes_on_with_clock_and_totals_and_forgets_the_lost_attempt(tmp_path: Path) -> None:
    path = tmp_path / "timeline.jsonl"
    first = Timeline(path, offset_s=1000.0)
    now = time.monotonic()
    first.add("learner", "learn", now - 2.0, now, 1)
    state = json.loads(json.dumps(first.state()))
    with first.span("learner", "publish", 2):  # after the checkpoint
        pass
    first.flush()

    second = Timeline(path)
    now = time.monotonic()
    second.add("learner", "start", now, now + 3.0, 1)
    second.restore(state)
    second.add("learner", "learn", now + 3.0, now + 7.0, 1)
    second.flush()

    spans = read_spans(path)
    assert [span.kind for span in spans] == ["learn", "start", "learn"]
    assert spans[0].end_s <= state["elapsed_s"] <= spans[1].start_s
    assert spans[2].start_s - spans[1].start_s == pytest.approx(3.0, abs=1e-5)
    assert second.elapsed_s >= state["elapsed_s"] >= 1000.0
    assert second.totals() == pytest.approx({("learner", "learn"): 6.0, ("learner", "start"): 3.0})  # 2 + 4


def test_a_run_without_a_checkpoint_starts_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "timeline.jsonl"
    path.write_text('{"role": "learner", "kind": "learn", "start_s": 1.0, "end_s": 2.0, "policy_version": 0}\n')

    Timeline(path).flush()

    assert read_spans(path) == []


def test_a_last_line_cut_by_a_kill_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "timeline.jsonl"
    timeline = Timeline(path)
    for version in range(2):
        with timeline.span("scorer", "score", version):
            pass
    timeline.flush()
    path.write_bytes(path.read_bytes()[:-1])

    assert [span.policy_version for span in read_spans(path)] == [0]
    assert read_spans(tmp_path / "missing.jsonl") == []


def test_the_union_counts_overlapping_seconds_once() -> None:
    spans = [Span("generator-0", "generate", *ends, 0) for ends in ((5.0, 6.0), (0.0, 4.0), (1.0, 2.0), (3.0, 4.5))]

    assert union_s(spans) == 5.5  # 0 to 4.5 and 5 to 6
    assert union_s([]) == 0.0


def test_the_summary_adds_up_roles_and_kinds() -> None:
    totals = {
        ("learner", "wait"): 7.0,
        ("learner", "learn"): 20.0,
        ("learner", "reference"): 3.0,
        ("learner", "publish"): 2.0,
        ("learner", "evaluate"): 5.0,
        ("learner", "checkpoint"): 1.0,
        ("learner", "record"): 0.5,
        ("scorer", "score"): 4.0,
        ("generator-0", "generate"): 30.0,
        ("generator-0", "swap"): 1.5,
        ("generator-0", "start"): 6.0,
        ("generator-1", "generate"): 25.0,
        ("generator-1", "swap"): 0.5,
    }

    assert summarise_timeline(totals, 40.0) == {
        "learner_busy_s": 31.5,  # 20 + 3 + 2 + 5 + 1 + 0.5
        "generator_busy_s": 55.0,  # 30 + 25
        "generator_idle_s": 17.0,  # 2 * 40 - 55 - (1.5 + 0.5) - 6
        "wait_for_rollouts_s": 7.0,
        "publish_s": 2.0,
        "swap_s": 2.0,
        "score_s": 4.0,
        "reference_s": 3.0,
        "learn_s": 20.0,
        "evaluate_s": 5.0,
        "checkpoint_s": 1.0,
        "ledger_s": 0.5,
        "wall_s": 40.0,
    }


def test_the_window_shows_updates_of_typical_length_and_not_the_slow_start() -> None:
    start = Span("learner", "start", -500.0, 0.0, 0)

    assert select_window([start, *steady_run(3)]) == (-500.0, 30.0)  # too short to choose
    start_s, end_s = select_window([start, *steady_run(100)])
    assert end_s - start_s == 60.0  # 6 updates of 10 s
    assert 200.0 < start_s < 800.0


def test_the_figure_has_a_lane_per_role_in_order() -> None:
    figure = draw_timeline(steady_run(40), from_s=100.0, to_s=150.0)

    upper, lower = figure.axes
    for axes in (upper, lower):
        lanes = [label.get_text() for label in axes.get_yticklabels()]
        assert lanes == ["learner", "generator-0", "generator-2", "generator-10"]
    assert upper.get_xlim() == (100.0, 150.0)
    assert [text.get_text() for text in lower.texts] == ["60% busy", "100% busy", "10% busy", "50% busy"]
    assert [text.get_text() for text in figure.legends[0].texts] == ["generate", "swap", "learn", "wait"]


def test_a_part_hides_the_whole_that_it_belongs_to() -> None:
    whole = Span("learner", "evaluate", 0.0, 10.0, 0)
    parts = [Span("learner", "wait", 2.0, 5.0, 0), Span("learner", "wait", 8.0, 10.0, 0)]

    figure = draw_timeline([whole, *parts])

    assert [text.get_text() for text in figure.axes[1].texts] == ["50% busy"]  # 10 - 3 - 2 of 10


def test_thousands_of_spans_become_a_picture_without_thousands_of_objects(tmp_path: Path) -> None:
    figure = draw_timeline(steady_run(2000))
    figure.savefig(tmp_path / "timeline.png")

    assert sum(len(axes.get_children()) for axes in figure.axes) < 300
    assert (tmp_path / "timeline.png").stat().st_size > 10_000


def test_every_kind_has_its_own_colour(tmp_path: Path) -> None:
    timeline = Timeline(tmp_path / "timeline.jsonl")

    assert len(set(COLORS.values())) == 11
    with pytest.raises(AssertionError, match="sampling"):
        timeline.add("learner", "sampling", 0.0, 1.0, 0)
    for kind in COLORS:
        timeline.add("learner", kind, 0.0, 1.0, 0)
