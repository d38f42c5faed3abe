"""A vLLM server as a child process: started on a free loopback port, ended by pid.

Its API key would guard /v1 only and leave the weight endpoints open, so it is bound to loopback.
"""

import logging
import os
import sys
import time
from pathlib import Path

import httpx
import torch

from stages.common.errors import GeneratorError
from stages.common.process import GuardedProcess, free_port, start_guarded
from stages.generation.config import GenerationConfig

logger = logging.getLogger(__name__)

MODEL_NAME = "policy"
PROJECT = Path(__file__).resolve().parents[2]
"""Where the worker processes import `vllm_worker` from."""


def start_server(model: Path, config: GenerationConfig, seed: int, log_path: Path) -> tuple[GuardedProcess, str]:
    """Start a server for a model directory and wait until it is healthy.

    Returns:
        The process and the server's URL.

    Raises:
        GeneratorError: it ended or was not healthy in time; the message holds its last log lines.
    """
    port = free_port()
    process = start_guarded(
        _command(model, config, seed, port), env=os.environ | _environment(config), log_path=log_path
    )
    url = f"http://127.0.0.1:{port}"
    started = time.monotonic()
    try:
        while not _is_healthy(url):
            if process.poll() is not None:
                raise GeneratorError(f"vLLM ended while starting; {log_path} ends with:\n{process.tail(15)}")
            if time.monotonic() - started > config.start_timeout_s:
                raise GeneratorError(
                    f"vLLM not healthy after generation.start_timeout_s={config.start_timeout_s}; "
                    f"{log_path} ends with:\n{process.tail(15)}"
                )
            time.sleep(0.25)
    except BaseException:
        process.stop()
        raise
    logger.info("vLLM is healthy url=%s start_s=%.1f", url, time.monotonic() - started)
    return process, url


def _is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def _command(model: Path, config: GenerationConfig, seed: int, port: int) -> list[str]:
    max_model_len = config.max_prompt_tokens + config.max_new_tokens
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(model), "--served-model-name", MODEL_NAME),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "bfloat16" if config.dtype == "bf16" else "float32"),
        *("--max-model-len", str(max_model_len), "--max-num-seqs", str(config.max_num_seqs)),
        *("--seed", str(seed)),
        # Logprobs of the distribution that is sampled, after temperature.
        *("--logprobs-mode", "processed_logprobs"),
        # Sampling defaults of the model's own generation_config would truncate the distribution.
        *("--generation-config", "vllm"),
        *("--worker-extension-cls", "stages.generation.vllm_worker.WeightsExtension"),
        *("--uvicorn-log-level", "warning"),
    ]
    if not torch.cuda.is_available():
        # A seeded request whose prompt is prefilled in chunks kills the CPU engine, so no chunks.
        command += ["--enforce-eager", "--no-enable-chunked-prefill"]
        command += ["--max-num-batched-tokens", str(max(8192, max_model_len))]
    return command + list(config.engine_args)


def _environment(config: GenerationConfig) -> dict[str, str]:
    return {
        "PYTHONPATH": os.pathsep.join([str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "VLLM_SERVER_DEV_MODE": "1",  # the endpoints that swap weights
        "VLLM_CPU_OMP_THREADS_BIND": config.cpu_cores,
        "VLLM_CPU_KVCACHE_SPACE": str(config.kv_cache_gib),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
