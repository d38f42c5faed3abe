"""A generator on a vLLM server: every prompt a concurrent request, continuous batching does the rest."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from stages.common.errors import GeneratorError
from stages.common.process import GuardedProcess
from stages.common.progress import progress
from stages.data.records import Completion
from stages.generation.config import GenerationConfig
from stages.generation.protocol import Group, Request, SamplingPlan, require_complete
from stages.generation.vllm_server import MODEL_NAME, start_server


class VllmGenerator:
    """Owns one local server.

    Args:
        model: directory of the first weights.
        config: section `generation`.
        eos_token_id: the token that finishes a completion.
        seed: of the server's own randomness; requests carry seeds of their own.
        log_path: where the server's output goes.
        policy_version: updates applied to `model`.
    """

    def __init__(
        self,
        model: Path,
        config: GenerationConfig,
        *,
        eos_token_id: int,
        seed: int,
        log_path: Path,
        policy_version: int,
    ) -> None:
        self._config = config
        self._eos = eos_token_id
        self._version = policy_version
        self._process: GuardedProcess
        self._process, self._url = start_server(model, config, seed, log_path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the server and every process it started."""
        self._process.stop()

    def publish(self, weights: Path, policy_version: int) -> None:
        """Load the weights of a model directory into the running engine."""
        try:
            self._call_workers("reload_weights", weights_path=str(weights.resolve()))
            self._call_workers("refresh_tied_heads")
        except httpx.HTTPError as error:
            raise GeneratorError(
                f"publishing policy_version={policy_version} failed: {error}\n{self._tail()}"
            ) from error
        self._version = policy_version

    def _call_workers(self, method: str, **arguments: str) -> None:
        body = {"method": method, "kwargs": arguments}
        timeout_s = self._config.request_timeout_s
        httpx.post(f"{self._url}/collective_rpc", json=body, timeout=timeout_s).raise_for_status()

    def generate(self, requests: Sequence[Request], plan: SamplingPlan) -> list[Group]:
        """All prompts at once; see `Generator.generate`."""
        try:
            groups = asyncio.run(self._generate(requests, plan))
        except httpx.TimeoutException as error:
            limit = self._config.request_timeout_s
            raise GeneratorError(f"no answer within generation.request_timeout_s={limit}\n{self._tail()}") from error
        except httpx.HTTPError as error:
            raise GeneratorError(f"vLLM: {type(error).__name__} {error}\n{self._tail()}") from error
        pairs = zip(groups, requests, strict=True)
        return [require_complete(group, request, plan, self._config.max_new_tokens) for group, request in pairs]

    def _tail(self) -> str:
        return f"{self._process.log_path} ends with:\n{self._process.tail(10)}"

    async def _generate(self, requests: Sequence[Request], plan: SamplingPlan) -> list[Group]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=self._config.request_timeout_s, limits=limits) as client:
            tasks = [asyncio.ensure_future(self._generate_group(client, item, plan)) for item in requests]
            try:
                for finished in progress(list(asyncio.as_completed(tasks)), "sampling", unit="prompt"):
                    await finished  # the first failure comes out here, as itself
            finally:
                for task in tasks:
                    task.cancel()
        return [task.result() for task in tasks]

    async def _generate_group(self, client: httpx.AsyncClient, request: Request, plan: SamplingPlan) -> Group:
        calls = [self._complete(client, request, plan.num_samples, greedy=False)] if plan.num_samples else []
        if plan.with_greedy:  # one request has one temperature, so the greedy completion is a second one
            calls.append(self._complete(client, request, 1, greedy=True))
        return tuple(completion for group in await asyncio.gather(*calls) for completion in group)

    async def _complete(
        self, client: httpx.AsyncClient, request: Request, num_samples: int, *, greedy: bool
    ) -> list[Completion]:
        body = {
            "model": MODEL_NAME,
            "prompt": list(request.prompt_ids),
            "n": num_samples,
            "max_tokens": self._config.max_new_tokens,
            "temperature": 0.0 if greedy else self._config.temperature,
            "top_p": 1.0,
            "top_k": -1,
            "seed": request.seed,
            "stop_token_ids": [self._eos],
            "logprobs": 0,
            "return_token_ids": True,
            # Reloading weights does not empty the prefix cache; a salt keeps versions apart.
            "cache_salt": f"policy_version={self._version}",
        }
        response = await client.post(f"{self._url}/v1/completions", json=body)
        if response.status_code != 200:
            raise GeneratorError(f"vLLM answered {response.status_code}: {response.text[:500]}")
        try:
            choices = sorted(response.json()["choices"], key=lambda choice: int(choice["index"]))
            return [self._read_choice(choice, request, index, greedy) for index, choice in enumerate(choices)]
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise GeneratorError(f"vLLM's answer is unusable: {error!r}: {response.text[:200]}") from error

    def _read_choice(self, choice: dict[str, Any], request: Request, index: int, greedy: bool) -> Completion:
        token_ids = tuple(int(token) for token in choice["token_ids"])
        return Completion(
            prompt_id=request.prompt_id,
            sample_index=index,
            is_greedy=greedy,
            prompt_ids=request.prompt_ids,
            token_ids=token_ids,
            sampling_logprobs=tuple(float(value) for value in choice["logprobs"]["token_logprobs"]),
            text=str(choice["text"]),
            is_finished=bool(token_ids) and token_ids[-1] == self._eos,
            first_policy_version=self._version,
            last_policy_version=self._version,
        )
