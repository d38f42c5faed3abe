"""Which pipeline run a stage belongs to, and how long each stage took.

A pipeline run is what one MLflow parent run stands for. The first stage that runs opens it; the stages after
it continue it while params.yaml is the same; the last stage finishes it.
"""

import fcntl
import json
import os
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from stages.common.config import PARAMS
from stages.common.hashing import hash_text
from stages.common.publish import write_json

PIPELINE_VARIABLE = "SLIPSTREAM_PIPELINE_RUN"
"""Id of the MLflow run that is the parent of every stage; whoever set it also ends that run."""
RECORD = Path(".slipstream/pipeline.json")
TIMINGS = Path(".slipstream/timings.json")
LAST_STAGE = "judge_policy"


@dataclass(frozen=True)
class Pipeline:
    """One pipeline run."""

    id: str
    is_external: bool = False
    """Whether `id` is an MLflow run that someone else made and will end."""
    supersedes: str | None = None
    """An earlier pipeline run that was given up, because settings changed before it finished."""


def open_pipeline() -> Pipeline:
    """The pipeline run that a stage starting now belongs to."""
    external = os.environ.get(PIPELINE_VARIABLE)
    if external:
        return Pipeline(external, is_external=True)
    params_sha256 = hash_text(PARAMS.read_text(encoding="utf-8")) if PARAMS.exists() else ""
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


def _read(path: Path) -> dict[str, object]:
    try:
        content: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return content
