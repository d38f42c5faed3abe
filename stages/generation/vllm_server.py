"""The command that starts a vLLM server, and one as a child process on a free loopback port.

Its API key would guard /v1 only and leave the weight endpoints open, so it is bound to loopback.
"""

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from stages.common.process import GuardedProcess, free_port, start_guarded
from stages.generation.config import GenerationConfig, Publish
from stages.generation.devices import bind_cores, name_visible_gpus
from stages.generation.engine_args import count_workers
from stages.generation.vllm_client import MODEL_NAME

PROJECT = Path(__file__).resolve().parents[2]
"""Where the worker processes import `vllm_worker` from."""


@dataclass(frozen=True)
class ServerSettings:
    """What differs between the servers of one model."""

    seed: int
    """Of the server's own randomness."""
    host: str = "127.0.0.1"
    """Address it listens on."""
    port: int = 0
    """0: one that is free, for `start_server`."""
    devices: str | None = None
    """CPU cores or GPUs to keep to, counted as this process sees them; None: `generation.cpu_cores`, or every GPU."""
    publish: Publish = "files"
    """How it gets new weights."""


def start_server(
    model: Path, config: GenerationConfig, settings: ServerSettings, *, log_path: Path, remove: Sequence[Path] = ()
) -> tuple[GuardedProcess, str]:
    """Start a server for a model directory; it is not healthy yet.

    Args:
        model: the first weights.
        config: section `generation`.
        settings: address, devices and how it gets new weights.
        log_path: where its output goes.
        remove: paths that are deleted once the server is gone, also if this process is killed.

    Returns:
        The process and the server's URL.
    """
    settings = replace(settings, port=settings.port or free_port())
    env = os.environ | server_environment(config, settings)
    cores = None if torch.cuda.is_available() else settings.devices
    command = server_command(model, config, settings)
    process = start_guarded(command, env=env, log_path=log_path, cores=cores, remove=remove, temporary=True)
    return process, f"http://{settings.host}:{settings.port}"


def server_command(model: Path, config: GenerationConfig, settings: ServerSettings) -> list[str]:
    """The command line of a server that speaks what `VllmClient` says."""
    max_model_len = config.max_prompt_tokens + config.max_new_tokens
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(model), "--served-model-name", MODEL_NAME),
        *("--host", settings.host, "--port", str(settings.port)),
        *("--dtype", "bfloat16" if config.dtype == "bf16" else "float32"),
        *("--max-model-len", str(max_model_len), "--max-num-seqs", str(config.max_num_seqs)),
        *("--seed", str(settings.seed)),
        # Logprobs of the distribution that is sampled, after temperature.
        *("--logprobs-mode", "processed_logprobs"),
        # Sampling defaults of the model's own generation_config would truncate the distribution.
        *("--generation-config", "vllm"),
        *("--worker-extension-cls", "stages.generation.vllm_worker.WeightsExtension"),
        "--enable-scale-out",  # /inference/v1/generate: token ids in and out, each with its weight version
        *("--uvicorn-log-level", "warning"),
    ]
    if not torch.cuda.is_available():
        # A seeded request whose prompt is prefilled in chunks kills the CPU engine, so no chunks.
        command += ["--enforce-eager", "--no-enable-chunked-prefill"]
        command += ["--max-num-batched-tokens", str(max(8192, max_model_len))]
        # The samples of a prompt share its whole blocks, and few prompts fill one of the 128 tokens that are the CPU's
        # default; 32 is the least it allows.
        command += ["--block-size", "32"]
    if settings.publish != "files":
        command += ["--weight-transfer-config", json.dumps({"backend": settings.publish})]
    return command + list(config.engine_args)


def server_environment(config: GenerationConfig, settings: ServerSettings) -> dict[str, str]:
    """What the server's environment needs besides ours.

    Raises:
        SettingError: `settings.devices` are too few, or not there.
    """
    devices = settings.devices
    compiled = str(Path(tempfile.gettempdir()) / f"torchinductor_{os.getuid()}")
    environment = {
        "PYTHONPATH": os.pathsep.join([str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "VLLM_SERVER_DEV_MODE": "1",  # the endpoints that swap weights
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        # What one server compiled serves the next, although each has a TMPDIR of its own.
        "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", compiled),
    }
    if not torch.cuda.is_available():
        cores = bind_cores(devices or config.cpu_cores, count_workers(config.engine_args))
        environment |= {"VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_CPU_KVCACHE_SPACE": str(config.kv_cache_gib)}
    elif devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = name_visible_gpus(devices)
        if "LOCAL_RANK" in os.environ:  # the learner's, which counts all GPUs
            environment["LOCAL_RANK"] = "0"
    if settings.publish == "ipc":
        # Handles of GPU memory come pickled; who could send others can reach the weights' endpoints anyhow.
        environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    return environment
