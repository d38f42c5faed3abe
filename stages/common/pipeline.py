"""What dvc.yaml and dvc.lock say about a stage, read as plain YAML (stages do not import dvc)."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stages.common.errors import RunError, SettingError

DVC_YAML = Path("dvc.yaml")
DVC_LOCK = Path("dvc.lock")


@dataclass(frozen=True)
class StageEntry:
    """One stage of dvc.yaml."""

    name: str
    cmd: str
    deps: tuple[str, ...]
    outs: tuple[str, ...]
    params: tuple[tuple[str, str | None], ...]
    """(file, dotted key); a key of None is the whole file."""


@dataclass(frozen=True)
class LockEntry:
    """What dvc.lock says about the last run of a stage."""

    deps: dict[str, str]
    """md5 by path."""
    outs: dict[str, str]
    """md5 by path; a directory's ends in `.dir`."""
    settings: dict[str, Any]
    """Values of the keys of params.yaml that dvc.yaml names, by dotted key."""


def read_stage(stage: str, path: Path = DVC_YAML) -> StageEntry:
    """The stage's entry in dvc.yaml.

    Raises:
        RunError: dvc.yaml is missing, is not YAML, or has no such stage.
    """
    stages = read_stages(path)
    if stage not in stages:
        raise RunError(f"{path}: has no stage {stage!r}")
    return stages[stage]


def read_stages(path: Path = DVC_YAML) -> dict[str, StageEntry]:
    """Every stage of dvc.yaml, in the order of the file.

    Raises:
        RunError: dvc.yaml is missing or is not YAML.
    """
    stages = read_yaml(path).get("stages") or {}
    return {name: _read_entry(name, entry) for name, entry in stages.items() if isinstance(entry, dict)}


def find_upstream(stage: str, stages: dict[str, StageEntry]) -> list[str]:
    """The stages that make what this one reads, directly or not; each after those that it needs."""
    makers = {out: entry.name for entry in stages.values() for out in entry.outs}
    found: list[str] = []

    def visit(name: str) -> None:
        for dep in stages[name].deps:
            maker = makers.get(dep)
            if maker is not None and maker not in found:
                visit(maker)
                found.append(maker)

    visit(stage)
    return found


def _read_entry(stage: str, entry: dict[str, Any]) -> StageEntry:
    cmd = entry.get("cmd", "")
    return StageEntry(
        name=stage,
        cmd=cmd if isinstance(cmd, str) else "\n".join(cmd),
        deps=tuple(_names(entry.get("deps"))),
        outs=tuple(name for kind in ("outs", "metrics", "plots") for name in _names(entry.get(kind))),
        params=tuple(_params(entry.get("params"))),
    )


def read_settings(entry: StageEntry) -> dict[str, Any]:
    """The values of the stage's `params`, by dotted key (`file:key` outside params.yaml).

    Raises:
        SettingError: a key that dvc.yaml names is not in its file.
    """
    settings = {}
    files = {file: read_yaml(Path(file)) for file in dict.fromkeys(file for file, _ in entry.params)}
    for file, key in entry.params:
        value: Any = files[file]
        for part in key.split(".") if key else ():
            if not isinstance(value, dict) or part not in value:
                raise SettingError(f"{file}: {key} is missing; dvc.yaml names it as a setting of {entry.name}")
            value = value[part]
        settings[key or file if file == "params.yaml" else f"{file}:{key or ''}"] = value
    return settings


def read_out_hashes(path: Path = DVC_LOCK) -> dict[str, str]:
    """md5 of every out that dvc.lock records, by path; empty without a readable dvc.lock."""
    return {out: md5 for entry in read_lock(path).values() for out, md5 in entry.outs.items()}


def read_lock(path: Path = DVC_LOCK) -> dict[str, LockEntry]:
    """What dvc.lock says about every stage; empty without a readable dvc.lock."""
    try:
        stages = read_yaml(path).get("stages") or {}
    except RunError:  # nothing has run yet, or a killed dvc truncated it
        return {}
    return {
        stage: LockEntry(
            deps=_hashes(entry.get("deps")),
            outs=_hashes(entry.get("outs")),
            settings=(entry.get("params") or {}).get("params.yaml") or {},
        )
        for stage, entry in stages.items()
        if isinstance(entry, dict)
    }


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        RunError: it is missing, is not YAML, or holds something else.
    """
    try:
        content = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(f"{path}: not found; run from the project's folder") from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise RunError(f"{path}: holds no mapping")
    return content


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys: `{"rl": {"lr": 1}}` becomes `{"rl.lr": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def _hashes(entries: Iterable[Any] | None) -> dict[str, str]:
    return {entry["path"]: entry["md5"] for entry in entries or () if isinstance(entry, dict) and "md5" in entry}


def _names(entries: Iterable[Any] | None) -> list[str]:
    """Paths of deps or outs; an entry is a path, or {path: options}."""
    return [name for entry in entries or () for name in ([entry] if isinstance(entry, str) else entry)]


def _params(entries: Iterable[Any] | None) -> list[tuple[str, str | None]]:
    """An entry is a key of params.yaml, or {file: [keys]}, or {file: null} for the whole file."""
    params: list[tuple[str, str | None]] = []
    for entry in entries or ():
        if isinstance(entry, str):
            params.append(("params.yaml", entry))
            continue
        for file, keys in entry.items():
            params += [(file, key) for key in keys] if keys else [(file, None)]
    return params
