"""vLLM's offline engine as a process that limits_generator.py asks: one JSON line in, one out, until its input ends."""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from stages.common.guard import parse_cores
from stages.generation.config import GenerationConfig
from stages.generation.vllm_server import ServerSettings, server_command


def main() -> None:
    job = json.loads(sys.argv[1])
    config = GenerationConfig.model_validate(job["config"])
    os.sched_setaffinity(0, parse_cores(config.cpu_cores))  # all of it, as a server of the fleet
    engine = make_engine(Path(job["model"]), config)
    for line in sys.stdin:
        print(json.dumps(answer(engine, json.loads(line), job, config)), flush=True)


def make_engine(model: Path, config: GenerationConfig) -> Any:
    """With the settings of a server of the fleet, read by vLLM from the same command line."""
    from vllm import LLM, EngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    command = server_command(model, config, ServerSettings(seed=0, port=1))
    parsed = make_arg_parser(FlexibleArgumentParser(prog="vllm")).parse_args(command[3:])
    return LLM.from_engine_args(EngineArgs.from_cli_args(parsed))


def answer(engine: Any, question: dict[str, Any], job: dict[str, Any], config: GenerationConfig) -> dict[str, Any]:
    """Sample a round's prompts: all in one call, or one mini-batch after the other."""
    requests = question["requests"]
    size = len(requests) if question["arm"] == "at once" else job["batch"]
    started = time.perf_counter()
    ids: list[list[list[int]]] = []
    for first in range(0, len(requests), size):
        ids += generate(engine, requests[first : first + size], question["salt"], job, config)
    return {"seconds": time.perf_counter() - started, "ids": ids}


def generate(
    engine: Any, requests: Sequence[Any], salt: str, job: dict[str, Any], config: GenerationConfig
) -> list[list[list[int]]]:
    """Token ids of every completion of every prompt, the greedy one last."""
    from vllm import SamplingParams

    common = {"max_tokens": config.max_new_tokens, "logprobs": 0, "detokenize": False, "stop_token_ids": [job["eos"]]}
    prompts, parameters = [], []
    for prompt_ids, seed in requests:
        prompts.append({"prompt_token_ids": prompt_ids, "cache_salt": salt})
        parameters.append(SamplingParams(n=job["samples"], temperature=config.temperature, seed=seed, **common))
        if job["with_greedy"]:
            prompts.append({"prompt_token_ids": prompt_ids, "cache_salt": f"{salt}-greedy"})
            parameters.append(SamplingParams(n=1, temperature=0.0, seed=seed, **common))
    outputs = engine.generate(prompts, parameters, use_tqdm=False)
    groups = [[list(choice.token_ids) for choice in output.outputs] for output in outputs]
    if not job["with_greedy"]:
        return groups
    return [samples + greedy for samples, greedy in zip(groups[::2], groups[1::2], strict=True)]


if __name__ == "__main__":
    main()
