"""`generation.engine_args`: which arguments of vLLM's server are the user's, and whether vLLM takes them.

Read by machines that have no GPU too, so vLLM itself is asked only where there is something to ask, and in a process
of its own: importing it takes seconds, and it changes the process that does.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from stages.common.errors import RunError, SettingError

_OURS = "Slipstream needs it as it sets it; leave it out"
RESERVED: Mapping[str, str] = {
    "--model": "served is the model folder of the stage; set model.source",
    "--served-model-name": _OURS,
    "--tokenizer": "the tokenizer lies in the model folder; set model.source",
    "--host": "local servers listen on loopback only; use `python -m stages.serve --host`",
    "--port": "local servers take a free one; use `python -m stages.serve --port`",
    "--uds": "servers are spoken to over TCP; leave it out",
    "--grpc": "servers are spoken to over HTTP; leave it out",
    "--headless": "servers are spoken to over HTTP; leave it out",
    "--dtype": "set generation.dtype",
    "--max-model-len": "set generation.max_prompt_tokens and generation.max_new_tokens",
    "--max-num-seqs": "set generation.max_num_seqs",
    "--seed": "set the seed of the section that samples, such as rl.seed",
    "--logprobs-mode": _OURS,
    "--generation-config": _OURS,
    "--override-generation-config": _OURS,
    "--worker-extension-cls": _OURS,
    "--enable-scale-out": _OURS,
    "--uvicorn-log-level": _OURS,
    "--weight-transfer-config": "set rl.publish",
    "--load-format": "weights are read from safetensors only; leave it out",
    "--trust-remote-code": "no code of a model's repository is run; leave it out",
    "--config": "a file of arguments would not be seen by DVC; list the arguments themselves",
    "--api-key": "vLLM asks for it under /v1 only, which is not used; see docs/deployment.md",
    "--help": "it starts no server; leave it out",
    "-h": "it starts no server; leave it out",
}
"""Arguments that are refused, and what to do instead."""
TIMEOUT_S = 300
"""Seconds for the import of vLLM, which takes ten on an idle machine."""
_PARSER = "stages.generation.vllm_parser"
_PROJECT = Path(__file__).resolve().parents[2]
_SIZES = (
    ("-tp", "--tensor-parallel-size"),
    ("-pp", "--pipeline-parallel-size"),
    ("-dp", "--data-parallel-size"),
)


def refuse_reserved(arguments: Sequence[str]) -> None:
    """Refuse arguments that Slipstream sets itself.

    Raises:
        ValueError: with the argument and the setting to use instead.
    """
    for argument in arguments:
        # vLLM takes underscores for dashes, and `--name.key` for a key of an argument that is a JSON object.
        name = re.split(r"[=.]", argument, maxsplit=1)[0].replace("_", "-")
        if name in RESERVED:
            raise ValueError(f"generation.engine_args: {argument!r} is not allowed: {RESERVED[name]}")


def count_workers(arguments: Sequence[str]) -> int:
    """Devices that one server needs: tensor × pipeline × data parallel.

    Raises:
        SettingError: a size is no number above 0.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for names in _SIZES:
        parser.add_argument(*names, type=int, default=1)
    try:
        # Only names are rewritten: the value of another argument may hold an underscore.
        sizes = vars(parser.parse_known_args([with_dashes(argument) for argument in arguments])[0])
    except argparse.ArgumentError as error:
        raise SettingError(f"generation.engine_args: {error}") from error
    total = 1
    for name, size in sizes.items():
        if size < 1:
            raise SettingError(f"generation.engine_args: --{name.replace('_', '-')}={size}: allowed: 1 or more")
        total *= size
    return total


def check_engine_args(arguments: Sequence[str]) -> None:
    """Have vLLM's own parser read the arguments, before anything is started with them. Takes seconds if there are any.

    Raises:
        SettingError: vLLM does not know one, or does not take its value; with vLLM's message.
        RunError: vLLM cannot be asked: it is not installed, or does not start.
    """
    if not arguments:
        return
    command = [sys.executable, "-m", _PARSER, *arguments]
    try:
        done = subprocess.run(command, cwd=_PROJECT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise RunError(f"generation.engine_args: vLLM's parser gave no answer within {TIMEOUT_S} s") from error
    lines = done.stderr.strip().splitlines() or ["no message"]
    if done.returncode == 2:  # argparse's code; its last line says what it does not take
        message = lines[-1].partition("error: ")[2] or lines[-1]
        raise SettingError(f"generation.engine_args={list(arguments)}: vLLM refuses them: {message}")
    if done.returncode != 0:
        raise RunError(f"generation.engine_args cannot be checked: vLLM's parser failed: {lines[-1]}")


def with_dashes(argument: str) -> str:
    """The argument by the name that vLLM's help has: it takes underscores for dashes."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument
