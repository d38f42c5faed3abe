"""Which run made what dvc.lock holds, noted as events that reach MLflow like all others.

DVC hashes the outs of a stage after the stage has ended. So every stage that starts notes the hashes of those
before it, and `python -m stages.link_runs` those of the last. An event `outs` belongs to the log of the stage that
made them; an event `link` names, for a pipeline run, the hashes that it took over from earlier runs.
"""

import logging
from collections.abc import Iterable, Set
from typing import Any

from stages.common.event_log import TRACKING, EventLog
from stages.common.pipeline import LockEntry, StageEntry, find_upstream, read_lock, read_stages
from stages.common.pipeline_record import LAST_STAGE
from stages.common.stage_runs import StageRun, hash_entry, is_made_by, note_change, read_stage_runs

LINKS = "links.jsonl"
POLICY = "artifacts/policy"

logger = logging.getLogger(__name__)


def note_upstream(stage: str, pipeline: dict[str, Any]) -> None:
    """Link what stands before a stage that starts; `pipeline` is what makes its run (`describe_pipeline`)."""
    stages = read_stages()
    if stage in stages:
        note_links(find_upstream(stage, stages), pipeline)


def note_links(
    names: Iterable[str],
    pipeline: dict[str, Any],
    *,
    settled: Set[str] = frozenset(),
    pipeline_status: str | None = None,
) -> None:
    """Note what the last runs of these stages made, and which outs are those of an earlier pipeline run.

    Args:
        names: stages in an order in which they can run.
        pipeline: what makes the pipeline's run, should it not exist (`describe_pipeline`).
        settled: stages of which DVC has just said that dvc.lock holds their last run.
        pipeline_status: how the pipeline's run ended, if this ends it.
    """
    lock, stages = read_lock(), read_stages()
    reused = {}
    for name in names:
        if name not in lock or name not in stages or not lock[name].outs:
            continue
        run = read_stage_runs().stages.get(name)
        if run is not None and _is_new(run, stages[name], lock, is_settled=name in settled):
            _note_outs(name, run, lock, stages)
            run = read_stage_runs().stages[name]
        if run is None or (run.pipeline, run.outs) != (pipeline["pipeline"]["id"], lock[name].outs):
            reused[name] = lock[name].outs
    if reused or pipeline_status:
        path = TRACKING / pipeline["pipeline"]["id"] / LINKS
        _append(EventLog(path), "link", **pipeline, reused=reused, pipeline_status=pipeline_status)


def _is_new(run: StageRun, stage: StageEntry, lock: dict[str, LockEntry], *, is_settled: bool) -> bool:
    """Whether dvc.lock holds what this run made and nobody noted it yet."""
    if run.status != "FINISHED" or run.outs is not None:
        return False
    # An entry as before the run is mostly that of the run before: dvc was killed before it wrote the new one.
    is_written = is_settled or hash_entry(lock[stage.name]) != run.entry_before
    return is_written and is_made_by(run, stage, lock)


def _note_outs(name: str, run: StageRun, lock: dict[str, LockEntry], stages: dict[str, StageEntry]) -> None:
    path = TRACKING / run.pipeline / f"{name}.jsonl"
    if path.exists():
        inputs = {dep: md5 for dep, md5 in lock[name].deps.items() if not dep.startswith("stages/")}
        judged = find_judged_policy(lock, stages) if name == LAST_STAGE else None
        _append(EventLog(path), "outs", outs=lock[name].outs, inputs=inputs, pipeline_id=run.pipeline, judged=judged)
    else:
        logger.warning("the local log of a run is gone, its outs are not linked path=%s", path)
    note_change(name, outs=lock[name].outs)


def find_judged_policy(lock: dict[str, LockEntry], stages: dict[str, StageEntry]) -> str | None:
    """Hash of the policy that the last stage judged, if dvc.lock fits together from there on."""
    makers = {out: name for name, entry in lock.items() for out in entry.outs}
    for name in (LAST_STAGE, *find_upstream(LAST_STAGE, stages)):
        for dep, md5 in lock[name].deps.items() if name in lock else ():
            if dep == POLICY:
                return md5
            if dep in makers and lock[makers[dep]].outs[dep] != md5:
                return None
    return None


def is_judged() -> bool:
    """Whether what the judge said last is about the present policy; without a dvc.lock of both nothing says otherwise.

    Raises:
        RunError: there is a dvc.lock but no readable dvc.yaml.
    """
    lock = read_lock()
    if LAST_STAGE not in lock or "train_policy" not in lock:
        return True
    return find_judged_policy(lock, read_stages()) == lock["train_policy"].outs.get(POLICY)


def _append(log: EventLog, kind: str, **fields: Any) -> None:
    log.append(kind, **fields)
    log.close()
