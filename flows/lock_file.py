"""A copy of the last good dvc.lock. DVC writes the file in place, so a kill at that moment truncates it.

With the copy put back, DVC finds the finished stage in its run cache and does not run it again.
"""

import logging
from pathlib import Path
from typing import Any

from stages.common.errors import RunError
from stages.common.pipeline import DVC_LOCK, DVC_YAML, read_yaml
from stages.common.publish import write_text

GOOD_LOCK = Path(".slipstream/dvc.lock.good")

logger = logging.getLogger(__name__)


def heal_lock() -> bool:
    """Put the good copy back if dvc.lock is damaged; returns whether it was."""
    if not DVC_LOCK.exists():
        return False
    problem = find_damage()
    if problem is None:
        return False
    if GOOD_LOCK.exists():
        logger.warning("dvc.lock is damaged (%s); restoring the last good copy", problem)
        write_text(DVC_LOCK, GOOD_LOCK.read_text(encoding="utf-8"))
        return True
    broken = DVC_LOCK.with_suffix(".lock.broken")
    logger.warning("dvc.lock is damaged (%s) and has no good copy; it is now %s", problem, broken)
    DVC_LOCK.replace(broken)
    return True


def keep_lock() -> None:
    """Take the present dvc.lock as the good copy, unless it is damaged."""
    if DVC_LOCK.exists() and find_damage() is None:
        write_text(GOOD_LOCK, DVC_LOCK.read_text(encoding="utf-8"))


def find_damage() -> str | None:
    """What is wrong with dvc.lock, or None. A file cut between two stages is still valid YAML."""
    try:
        stages = _stages(DVC_LOCK)
    except RunError as error:
        return str(error)
    wanted = _stages(DVC_YAML)
    good = _read_good()
    for name, entry in good.items():
        if name not in wanted:
            continue
        if name not in stages:
            return f"stage {name} is missing"
        if "outs" in entry and "outs" not in stages[name]:
            return f"stage {name} is cut short"
    return None


def _read_good() -> dict[str, Any]:
    try:
        return _stages(GOOD_LOCK)
    except RunError:
        return {}


def _stages(path: Path) -> dict[str, Any]:
    stages = read_yaml(path).get("stages")
    if not isinstance(stages, dict) or not all(isinstance(entry, dict) for entry in stages.values()):
        raise RunError(f"{path}: lists no stages")
    return stages
