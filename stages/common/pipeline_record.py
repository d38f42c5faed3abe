"""Which pipeline run a stage belongs to, and how long each stage took.

A pipeline run is what one MLflow parent run stands for. Whoever starts the stages may name it in
`SLIPSTREAM_PIPELINE`, on several machines at once. Else the first stage that runs opens it; the stages after it
continue it while params.yaml is the same; the last stage finishes it.
"""

import fcntl
import json
import os
import re
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from stages.common.config import PARAMS
from stages.common.errors import SettingError
from stages.common.hashing import hash_text
from stages.common.publish import write_json

PIPELINE_VARIABLE = "SLIPSTREAM_PIPELINE"
"""Id of the pipeline run that every stage belongs to, made by whoever starts the stages."""
RECORD = Path(".slipstream/pipeline.json")
TIMINGS = Path(".slipstream/timings.json")
LAST_STAGE = "judge_policy"
_ID = re.compile(r"[A-Za-z0-9_][\w.-]{0,199}", re.ASCII)


@dataclass(frozen=True)
class Pipeline:
    """One pipeline run."""

    id: str
    supersedes: str | None = None
    """An earlier pipeline run that was given up, because settings changed before it finished."""


def open_pipeline() -> Pipeline:
    """The pipeline run that a stage starting now belongs to.

    Raises:
        SettingError: SLIPSTREAM_PIPELINE holds something that cannot be a name.
    """
    external = _read_variable()
    if external:
        return Pipeline(external)
    params_sha256 = _hash_params()
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    with RECORD.with_suffix(".lock").open("a") as lock:  # two first stages may start at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        record = _read(RECORD)
        is_open = bool(record) and not record["finished"]
        if is_open and record["params_sha256"] == params_sha256:
            return Pipeline(str(record["id"]))
        pipeline_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"
        write_json(RECORD, {"id": pipeline_id, "params_sha256": params_sha256, "finished": False})
        return Pipeline(pipeline_id, supersedes=str(record["id"]) if is_open else None)


def last_pipeline() -> Pipeline | None:
    """The pipeline run that was opened last with today's settings, finished or not.

    Raises:
        SettingError: SLIPSTREAM_PIPELINE holds something that cannot be a name.
    """
    newest = newest_pipeline()
    is_current = _read_variable() or _read(RECORD).get("params_sha256") == _hash_params()
    return newest if is_current else None


def newest_pipeline() -> Pipeline | None:
    """The pipeline run that was opened last, finished or not, whatever today's settings are.

    Raises:
        SettingError: SLIPSTREAM_PIPELINE holds something that cannot be a name.
    """
    external = _read_variable()
    if external:
        return Pipeline(external)
    record = _read(RECORD)
    return Pipeline(str(record["id"])) if record else None


def is_finished(pipeline: Pipeline) -> bool:
    """Whether the pipeline run was opened in this folder and is over."""
    record = _read(RECORD)
    return record.get("id") == pipeline.id and bool(record["finished"])


def finish_pipeline(pipeline: Pipeline) -> None:
    """The next stage that runs opens a new pipeline run."""
    record = _read(RECORD)
    if record.get("id") == pipeline.id:
        write_json(RECORD, {**record, "finished": True})


def write_timing(stage: str, wall_s: float) -> None:
    """Keep how long the stage's last run took, for `python -m stages.report`."""
    timings = read_timings()
    write_json(TIMINGS, {**timings, stage: round(wall_s, 1)})


def read_timings() -> dict[str, float]:
    """Seconds each stage's last run took."""
    return {stage: float(str(wall_s)) for stage, wall_s in _read(TIMINGS).items()}


def _read_variable() -> str | None:
    name = os.environ.get(PIPELINE_VARIABLE)
    if name and not _ID.fullmatch(name):
        raise SettingError(
            f"{PIPELINE_VARIABLE}={name!r}: letters, digits and _ . - are allowed, at most 200, no . or - in front"
        )
    return name or None


def _hash_params() -> str:
    return hash_text(PARAMS.read_text(encoding="utf-8")) if PARAMS.exists() else ""


def _read(path: Path) -> dict[str, object]:
    try:
        content: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return content
