"""How a stage reports what it does: to a local log first, and behind it to MLflow.

One MLflow run per pipeline, one nested run per stage. A slow or dead tracking server never delays or fails a
stage: its events stay in `.slipstream/tracking/` and the next stage that reaches the server sends them.
Read on with event_log.py (the local log), tracking_sender.py (the thread), tracking_store.py (MLflow).
"""

import getpass
import json
import logging
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.common.config import PARAMS, SECTIONS, Section, load_section, read_params
from stages.common.errors import RunError
from stages.common.event_log import TRACKING, EventLog, encode_number
from stages.common.hashing import hash_text
from stages.common.pipeline import (
    DVC_LOCK,
    DVC_YAML,
    flatten,
    read_out_hashes,
    read_settings,
    read_stage,
)
from stages.common.pipeline_record import (
    LAST_STAGE,
    Pipeline,
    finish_pipeline,
    open_pipeline,
    write_timing,
)
from stages.common.publish import remove_path
from stages.common.tracking_sender import Sender
from stages.common.version import git_commit, is_git_dirty

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FLUSH_S = 20.0
"""Seconds a finished stage waits for its last events to be sent."""
FLUSH_WHEN_STOPPED_S = 5.0
_METRIC_NAME = re.compile(r"[\w./: -]{1,250}")
_ARTIFACT_NAME = re.compile(r"[\w-][\w. -]*(/[\w-][\w. -]*)*")

logger = logging.getLogger(__name__)


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
def track_stage(stage: str, config: Section | None, *, resume_dir: Path | None = None) -> Iterator[Tracker]:
    """Track one run of a stage.

    Args:
        stage: its name in dvc.yaml.
        config: its settings; all of them are shown, defaults too.
        resume_dir: where the stage keeps what it needs to resume. An attempt that finds what an earlier one
            left there goes on in the same MLflow run.
    """
    settings = _read_tracking_config()
    pipeline = open_pipeline()
    log = EventLog(TRACKING / pipeline.id / f"{stage}.jsonl")
    log.append("start", **_describe_start(stage, config, settings, pipeline, resume_dir))
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
        _finish(stage, pipeline, log, status)
        if status == "FINISHED":
            write_timing(stage, time.monotonic() - started)
            _forget_run(resume_dir)
        sender.close(FLUSH_WHEN_STOPPED_S if status == "KILLED" else FLUSH_S)
        log.close()


def _finish(stage: str, pipeline: Pipeline, log: EventLog, status: str) -> None:
    """Note the end of the stage, and of the pipeline if this ends it."""
    is_pipeline_over = status != "FINISHED" or stage == LAST_STAGE
    if status == "FINISHED" and stage == LAST_STAGE:
        finish_pipeline(pipeline)
    pipeline_status = status if is_pipeline_over and not pipeline.is_external else None
    log.append("end", status=status, pipeline_status=pipeline_status)


def _read_tracking_config() -> TrackingConfig:
    if PARAMS.exists() and "tracking" in read_params():
        return load_section("tracking", TrackingConfig)
    return TrackingConfig()


def _describe_start(
    stage: str,
    config: Section | None,
    settings: TrackingConfig,
    pipeline: Pipeline,
    resume_dir: Path | None,
) -> dict[str, Any]:
    """Everything needed to make the runs, now or after an outage."""
    return {
        "stage": stage,
        "run_key": _run_key(resume_dir),
        "resume_dir": str(resume_dir.resolve()) if resume_dir else None,
        "experiment": settings.experiment,
        "pipeline": asdict(pipeline),
        "pipeline_params": flatten(read_params()) if PARAMS.exists() else {},
        "params": _stage_params(stage, config),
        "tags": _tags(stage),
        "datasets": _datasets(stage),
    }


def _run_key(resume_dir: Path | None) -> str:
    """Names the run before MLflow does; found again by an attempt that resumes."""
    if resume_dir is None:
        return uuid.uuid4().hex
    path = resume_dir / "run_key"
    if not path.exists():
        resume_dir.mkdir(parents=True, exist_ok=True)
        path.write_text(uuid.uuid4().hex, encoding="utf-8")
    return path.read_text(encoding="utf-8")


def _forget_run(resume_dir: Path | None) -> None:
    """A run that finished is not resumed."""
    if resume_dir is not None:
        for name in ("run_key", "mlflow_run_id"):
            (resume_dir / name).unlink(missing_ok=True)


def _stage_params(stage: str, config: Section | None) -> dict[str, Any]:
    """What dvc.yaml names as the stage's settings, and its section with the defaults filled in."""
    params: dict[str, Any] = {}
    if _is_in_dvc_yaml(stage):
        params |= flatten(read_settings(read_stage(stage)))
    if config is not None:
        name = type(config).__name__.removesuffix("Config").lower()
        section = name if name in SECTIONS else stage
        params |= flatten(config.model_dump(mode="json"), f"{section}.")
    return params


def _tags(stage: str) -> dict[str, str]:
    return {
        "mlflow.source.name": f"stages.{stage}",
        "mlflow.source.git.commit": git_commit(),
        "mlflow.user": getpass.getuser(),
        "slipstream.git.dirty": str(is_git_dirty()).lower(),
        "slipstream.stage": stage,
        "dvc.lock.sha256": hash_text(DVC_LOCK.read_text(encoding="utf-8")) if DVC_LOCK.exists() else "none",
    }


def _datasets(stage: str) -> dict[str, str]:
    """DVC hash of every artifact the stage reads, by path."""
    if not _is_in_dvc_yaml(stage):
        return {}
    hashes = read_out_hashes()
    return {path: hashes[path] for path in read_stage(stage).deps if path in hashes}


def _is_in_dvc_yaml(stage: str) -> bool:
    if not DVC_YAML.exists():
        return False
    try:
        read_stage(stage)
    except RunError:
        return False
    return True
