"""Servers that a flow has started on other workers: where they are now, which may change while a run goes on.

Placement is no setting: the same run on other machines is the same run. So it comes by an environment variable, which
DVC does not look at, and not by params.yaml.
"""

import json
import os
from pathlib import Path

from stages.common.errors import RunError
from stages.generation.config import FILE, FleetConfig

VARIABLE = "SLIPSTREAM_GENERATORS"
"""A JSON file `{"weights_dir": …, "urls": […]}`; a URL is null while its server is being replaced."""


def use_remote_servers(config: FleetConfig) -> FleetConfig:
    """The servers that the environment names in the place of those of `rl.generator`.

    Raises:
        RunError: the file that the environment names cannot be read.
    """
    path = os.environ.get(VARIABLE)
    if not path:
        return config
    content = _read(Path(path))
    urls = tuple(f"{FILE}{path}#{index}" for index in range(len(content["urls"])))
    changes = {"replicas": 0, "devices": "auto", "urls": urls, "weights_dir": content["weights_dir"]}
    return FleetConfig.model_validate(config.model_dump() | changes)


def locate(url: str) -> str:
    """Where a server of `rl.generator.urls` is now; empty while nobody knows."""
    if not url.startswith(FILE):
        return url.rstrip("/")
    path, _, index = url.removeprefix(FILE).rpartition("#")
    return (_read(Path(path))["urls"][int(index)] or "").rstrip("/")


def _read(path: Path) -> dict[str, list[str | None]]:
    try:
        content: dict[str, list[str | None]] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise RunError(f"{VARIABLE}={path}: {error}") from error
    return content
