"""How a checkpoint is shared out over ranks, and bringing it to another number of them.

Each rank writes its part. DeepSpeed's universal format has one file a parameter instead, from which any number of
ranks can take theirs; it is made when a run goes on with another number of ranks than it was saved by.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

from stages.common.errors import InputError, RunError
from stages.learner.checkpoint import find_checkpoint
from stages.learner.config import LearnerConfig

NATIVE = "learner"
UNIVERSAL = "universal"
_FILE = "layout.json"
_TIMEOUT_S = 3600.0

logger = logging.getLogger(__name__)


def write_layout(directory: Path, config: LearnerConfig) -> None:
    """Say in a checkpoint's directory how it is shared out."""
    (directory / _FILE).write_text(json.dumps(_describe(config)))


def settle_stage(config: LearnerConfig, workdir: Path) -> LearnerConfig:
    """The settings with the stage of the checkpoint that the run goes on from, where they leave the stage open.

    Any number of ranks loads what stage 0 has saved, and what the others have, if it is their own stage.
    """
    found = find_checkpoint(workdir)
    if config.zero_stage != "auto" or found is None or not (found[0] / _FILE).is_file():
        return config  # a checkpoint without it is refused where it is loaded
    stage = json.loads((found[0] / _FILE).read_text())["zero_stage"]
    if stage != config.stage:
        logger.info("learner.zero_stage=auto: the run began with %d and keeps it, instead of %d", stage, config.stage)
    return config.model_copy(update={"zero_stage": stage})


def prepare_load(directory: Path, config: LearnerConfig) -> str:
    """Make a checkpoint loadable by this run's ranks; the name it is loaded under.

    Raises:
        InputError: there is none, or it was saved with another ZeRO stage or other adapters.
        RunError: it cannot be converted.
    """
    path = directory / _FILE
    if not path.is_file():
        raise InputError(f"{directory}: holds no learner checkpoint")
    saved, ours = json.loads(path.read_text()), _describe(config)
    for name in ("zero_stage", "lora"):
        if saved[name] != ours[name]:
            raise InputError(
                f"{directory}: was saved with learner.{name}={saved[name]!r}, the run has {ours[name]!r}; set it back, "
                "or remove the work directory to start afresh"
            )
    if saved["num_ranks"] == ours["num_ranks"] or ours["zero_stage"] == 0:
        return NATIVE
    logger.info("converting the checkpoint of %d ranks for %d", saved["num_ranks"], ours["num_ranks"])
    _convert(directory)
    return UNIVERSAL


def _describe(config: LearnerConfig) -> dict[str, object]:
    described: dict[str, object] = config.model_dump(mode="json", include={"num_ranks", "lora"})
    return described | {"zero_stage": config.stage}


def _convert(directory: Path) -> None:
    shutil.rmtree(directory / UNIVERSAL, ignore_errors=True)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(directory / NATIVE), "--output_folder", str(directory / UNIVERSAL)]
    # What it calls missing is a table of layers that are split in ways of its own, which ours are not.
    command += ["--inject_missing_state", "--num_extract_workers", "1", "--num_merge_workers", "1"]
    # It is a command for people: it prints, and asks for a launcher if it thinks that there is one.
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).splitlines()[-5:])
        raise RunError(f"{directory}: the checkpoint cannot be converted for another number of ranks:\n{last}")
