"""How a stage reports what it does: to a local log first, and behind it to MLflow.

One MLflow run per pipeline, one nested run per stage. A slow or dead tracking server never delays or fails a
stage: its events stay in `.slipstream/tracking/` and the next stage that reaches the server sends them.
Read on with tracking_start.py (what a run is made of), event_log.py (the local log), tracking_sender.py (the
thread), tracking_store.py (MLflow), tracking_traces.py (calls of a language model), links.py (which run made what).
"""

import json
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.common.config import PARAMS, Section, load_section, read_params
from stages.common.event_log import TRACKING, EventLog, encode_number
from stages.common.links import note_upstream
from stages.common.pipeline_record import (
    LAST_STAGE,
    Pipeline,
    finish_pipeline,
    newest_pipeline,
    open_pipeline,
    write_timing,
)
from stages.common.publish import remove_path
from stages.common.stage_runs import note_change, note_start
from stages.common.traces import TRACES_PER_EVENT, TraceRecord, write_traces
from stages.common.tracking_sender import Sender
from stages.common.tracking_start import describe_pipeline, describe_stage, find_entry, forget_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FLUSH_S = 20.0
"""Seconds a finished stage waits for its last events to be sent."""
FLUSH_WHEN_STOPPED_S = 5.0
_METRIC_NAME = re.compile(r"[\w./: -]{1,250}")
_ARTIFACT_NAME = re.compile(r"[\w-][\w. -]*(/[\w-][\w. -]*)*")


class TrackingConfig(Section):
    """What is tracked, and where it appears."""

    experiment: str = "slipstream"
    """Name of the MLflow experiment; runs of one experiment are compared side by side."""
    system_metrics: bool = True
    """Whether use of processor, memory and GPUs is recorded every ten seconds."""


class Tracker:
    """Reports of one stage. Only wrong use raises; an unreachable server never does."""

    def __init__(self, log: EventLog, sender: Sender) -> None:
        self._log = log
        self._sender = sender
        self._files = log.path.with_suffix("")
        self._last_step = 0

    @property
    def run_id(self) -> str | None:
        """Id of the stage's MLflow run; None until the server has answered."""
        return self._sender.run_id

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Report numbers of one step. NaN and infinity are kept as such."""
        encoded = {}
        for name, value in values.items():
            if not _METRIC_NAME.fullmatch(name):
                raise ValueError(f"metric name {name!r}: only letters, digits and _ - . : / are allowed")
            encoded[name] = encode_number(float(value))
        self._last_step = max(self._last_step, int(step))
        self._log.append("metrics", step=int(step), values=encoded)

    def log_summary(self, values: Mapping[str, float]) -> None:
        """Report final numbers, at the last step that was reported."""
        self.log_metrics(values, self._last_step)

    def log_table(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Report a table; a table of the same name is replaced."""
        columns = list(dict.fromkeys(column for row in rows for column in row))
        data = [[row.get(column) for column in columns] for row in rows]
        target = self._file(f"{name}.json")
        target.write_text(json.dumps({"columns": columns, "data": data}), encoding="utf-8")
        self._announce(target, is_table=True)

    def log_figure(self, name: str, figure: "Figure") -> None:
        """Report a figure as PNG."""
        target = self._file(f"{name}.png")
        figure.savefig(target, dpi=120, bbox_inches="tight")
        self._announce(target)

    def log_artifact(self, path: Path) -> None:
        """Report a small file or folder; it is copied, so it may change afterwards. No checkpoints."""
        target = self._file(path.name)
        remove_path(target)
        if path.is_dir():
            shutil.copytree(path, target)
        else:
            shutil.copyfile(path, target)
        self._announce(target)

    def log_traces(self, name: str, spans: Sequence[TraceRecord]) -> None:
        """Report calls of a language model, each as a trace of this run; a list of the same name is replaced.

        A record of a key that was reported before is the same trace, whose span is replaced.

        Raises:
            ValueError: the name is not allowed, two records have one key, or a number is NaN or infinite.
        """
        target = self._file(f"{name}.jsonl")
        write_traces(target, spans)
        for first in range(0, len(spans), TRACES_PER_EVENT):
            self._log.append("traces", source=str(target.resolve()), first=first, count=TRACES_PER_EVENT)

    def _file(self, name: str) -> Path:
        if not _ARTIFACT_NAME.fullmatch(name):
            raise ValueError(f"artifact name {name!r}: only letters, digits and _ - . / are allowed")
        target = self._files / name
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def _announce(self, target: Path, *, is_table: bool = False) -> None:
        name = target.relative_to(self._files).as_posix()
        self._log.append("artifact", name=name, source=str(target.resolve()), is_table=is_table)


@contextmanager
def track_stage(
    stage: str,
    config: Section | Sequence[Section] | None,
    *,
    resume_dir: Path | None = None,
    is_side: bool = False,
) -> Iterator[Tracker]:
    """Track one run of a stage.

    Args:
        stage: its name in dvc.yaml.
        config: its settings, one section or several; all of them are shown, defaults too.
        resume_dir: where the stage keeps what it needs to resume. An attempt that finds what an earlier one
            left there goes on in the same MLflow run.
        is_side: it is no part of the pipeline and may come after its end: it belongs to the pipeline run that was
            opened last, whose state stays. Only where there is none it opens one, and ends it.
    """
    settings = read_tracking_config()
    sections = [config] if isinstance(config, Section) else list(config or ())
    known = newest_pipeline() if is_side else None
    pipeline = known or open_pipeline()
    is_last = known is None if is_side else stage == LAST_STAGE
    log = EventLog(TRACKING / pipeline.id / f"{stage}.jsonl")
    described = describe_stage(stage, sections, resume_dir) | {"is_side": is_side}
    _start(stage, log, describe_pipeline(pipeline, settings.experiment), described)
    sender = Sender(log, system_metrics=settings.system_metrics)
    started = time.monotonic()
    status = "KILLED"  # what remains if something other than an error ends the stage
    try:
        yield Tracker(log, sender)
        status = "FINISHED"
    except Exception:
        status = "FAILED"
        raise
    finally:
        _finish(stage, pipeline, log, status, is_last=is_last, is_side=is_side)
        if status == "FINISHED":
            write_timing(stage, time.monotonic() - started)
            forget_run(resume_dir)
        sender.close(FLUSH_WHEN_STOPPED_S if status == "KILLED" else FLUSH_S)
        log.close()
        note_change(stage, run_id=sender.run_id)


def read_tracking_config() -> TrackingConfig:
    """Section `tracking`, or its defaults where it is left out.

    Raises:
        SettingError: the section is wrong.
    """
    if PARAMS.exists() and "tracking" in read_params():
        return load_section("tracking", TrackingConfig)
    return TrackingConfig()


def _start(stage: str, log: EventLog, pipeline: dict[str, Any], run: dict[str, Any]) -> None:
    """Note the start, and what made the stage's inputs."""
    log.append("start", **pipeline, **run)
    entry = find_entry(stage)
    if entry is not None:
        note_start(entry, run["run_key"], pipeline["pipeline"]["id"])
        note_upstream(stage, pipeline)


def _finish(stage: str, pipeline: Pipeline, log: EventLog, status: str, *, is_last: bool, is_side: bool) -> None:
    """Note the end of the stage, and of the pipeline if this ends it."""
    is_pipeline_over = is_last or (status != "FINISHED" and not is_side)
    if status == "FINISHED" and is_last:
        finish_pipeline(pipeline)
    log.append("end", status=status, pipeline_status=status if is_pipeline_over else None)
    note_change(stage, status=status)
