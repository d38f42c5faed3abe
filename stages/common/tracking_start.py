"""What is said about a stage and its pipeline when it starts: enough to make their runs now or after an outage."""

import getpass
import os
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stages.common.config import PARAMS, SECTIONS, Section, read_params
from stages.common.hashing import hash_text
from stages.common.pipeline import (
    DVC_LOCK,
    DVC_YAML,
    StageEntry,
    flatten,
    read_out_hashes,
    read_settings,
    read_stages,
)
from stages.common.pipeline_record import Pipeline
from stages.common.tracking_names import COMMIT_TAG, STAGE_TAG
from stages.common.version import git_commit, is_git_dirty

TAG_VARIABLES = {"SLIPSTREAM_FLOW_RUN": "prefect.flow_run_id", "SLIPSTREAM_RECIPE": "slipstream.recipe"}
"""Environment variables that become tags of every run; unset, empty and "none" are left out."""


def describe_pipeline(pipeline: Pipeline, experiment: str) -> dict[str, Any]:
    """Everything needed to make the pipeline's run."""
    return {
        "experiment": experiment,
        "pipeline": asdict(pipeline),
        "pipeline_params": flatten(read_params()) if PARAMS.exists() else {},
        "pipeline_tags": _shared_tags(),
    }


def describe_stage(stage: str, sections: Sequence[Section], resume_dir: Path | None) -> dict[str, Any]:
    """Everything needed to make the stage's run under its pipeline's."""
    entry = find_entry(stage)
    return {
        "stage": stage,
        "run_key": _run_key(resume_dir),
        "resume_dir": str(resume_dir.resolve()) if resume_dir else None,
        "params": _stage_params(stage, entry, sections),
        "tags": {
            "mlflow.source.name": f"stages.{stage}",
            STAGE_TAG: stage,
        },
        "datasets": _datasets(entry),
    }


def find_entry(stage: str) -> StageEntry | None:
    """The stage in dvc.yaml; None where there is no dvc.yaml, or not this stage in it."""
    return read_stages().get(stage) if DVC_YAML.exists() else None


def forget_run(resume_dir: Path | None) -> None:
    """A run that finished is not resumed."""
    if resume_dir is not None:
        for name in ("run_key", "mlflow_run_id"):
            (resume_dir / name).unlink(missing_ok=True)


def _shared_tags() -> dict[str, str]:
    """Tags of the pipeline's run and of each stage's."""
    named = {tag: os.environ.get(variable, "") for variable, tag in TAG_VARIABLES.items()}
    return {
        "mlflow.user": getpass.getuser(),
        COMMIT_TAG: git_commit(),
        "slipstream.git.dirty": str(is_git_dirty()).lower(),
        "dvc.lock.sha256": hash_text(DVC_LOCK.read_text(encoding="utf-8")) if DVC_LOCK.exists() else "none",
        **{tag: value for tag, value in named.items() if value not in ("", "none")},
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


def _stage_params(stage: str, entry: StageEntry | None, sections: Sequence[Section]) -> dict[str, Any]:
    """What dvc.yaml names as the stage's settings, and its sections with the defaults filled in."""
    params = flatten(read_settings(entry)) if entry else {}
    for section in sections:
        name = type(section).__name__.removesuffix("Config").lower()
        params |= flatten(section.model_dump(mode="json"), f"{name if name in SECTIONS else stage}.")
    return params


def _datasets(entry: StageEntry | None) -> dict[str, str]:
    """DVC hash of every artifact the stage reads, by path."""
    hashes = read_out_hashes() if entry else {}
    return {path: hashes[path] for path in (entry.deps if entry else ()) if path in hashes}
