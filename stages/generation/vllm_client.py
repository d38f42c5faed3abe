"""What is said to one vLLM server: token ids in and out, weights, health. It holds no state of its own."""

import asyncio
import json
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
from transformers import PreTrainedTokenizerBase

from stages.common.errors import GeneratorError
from stages.data.records import Completion
from stages.data.text import decode_completion
from stages.generation.config import GenerationConfig
from stages.generation.protocol import Group, Request, SamplingPlan, require_complete

MODEL_NAME = "policy"


class VllmClient:
    """One server.

    Args:
        url: where it listens.
        config: section `generation`.
        tokenizer: of the policy.
        http: the connections to use.
    """

    def __init__(
        self, url: str, config: GenerationConfig, tokenizer: PreTrainedTokenizerBase, http: httpx.AsyncClient
    ) -> None:
        self.url = url
        self._config = config
        self._tokenizer = tokenizer
        self._http = http

    async def sample(self, request: Request, plan: SamplingPlan, salt: str) -> Group:
        """All completions of one prompt, with the versions the server says sampled them.

        Args:
            request: the prompt.
            plan: how many samples, and whether a greedy completion.
            salt: requests with different salts share no cached prefix. vLLM allows no slash in it.

        Raises:
            GeneratorError: an answer that is not what was asked for.
            TimeoutError: none within `generation.request_timeout_s`.
        """
        limit = self._config.request_timeout_s
        try:
            # The HTTP client's own limit is per read, which a slow drip of bytes never reaches.
            async with asyncio.timeout(limit):
                # One request has one temperature, so the greedy completion is a second one.
                calls = [self._generate(request, plan, salt, greedy=False)] if plan.num_samples else []
                calls += [self._generate(request, plan, salt, greedy=True)] if plan.with_greedy else []
                groups = await _gather(calls)
        except TimeoutError as error:
            raise TimeoutError(f"{self.url}: no answer within generation.request_timeout_s={limit}") from error
        group = tuple(completion for part in groups for completion in part)
        return require_complete(group, request, plan, self._config.max_new_tokens)

    async def probe(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probability of each token but the first under the weights being served, at temperature 1, in nats.

        Raises:
            GeneratorError: an answer that holds none.
        """
        parameters = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "detokenize": False}
        answer = await self._post(
            "/inference/v1/generate", {"token_ids": list(token_ids), "sampling_params": parameters}
        )
        try:
            pairs = zip(token_ids[1:], answer["prompt_logprobs"][1:], strict=True)
            return [float(entry[str(token)]["logprob"]) for token, entry in pairs]
        except (KeyError, TypeError, ValueError) as error:
            raise GeneratorError(f"{self.url}: the probe's answer is unusable: {error!r}") from error

    async def warm_up(self) -> None:
        """Have it sample two tokens and forget them: its first sampling builds or loads code, for seconds on end."""
        parameters = {"max_tokens": 2, "temperature": self._config.temperature, "seed": 0, "logprobs": 0}
        body = {"token_ids": [self._tokenizer.eos_token_id], "cache_salt": "warm-up"}
        await self._post("/inference/v1/generate", body | {"sampling_params": parameters | {"detokenize": False}})

    async def load(self, weights: Path) -> None:
        """Load a safetensors file, or those of a directory, into the engine."""
        arguments = {"path": str(weights.resolve())}
        await self._post("/collective_rpc", {"method": "load_published", "kwargs": arguments})

    async def count_workers(self) -> int:
        """Processes that hold parts or copies of its model: tensor × pipeline × data parallel.

        Raises:
            GeneratorError: it does not say.
        """
        answer = _read_json(self.url, await self._http.get(f"{self.url}/get_world_size"))
        try:
            return int(answer["world_size"])
        except (KeyError, TypeError, ValueError) as error:
            raise GeneratorError(f"{self.url}: no world_size in {json.dumps(answer)[:100]}") from error

    async def open_transfer(self, info: Mapping[str, Any]) -> None:
        """Have its workers meet the learner for the transfers to come; answers when they have met."""
        await self._post("/init_weight_transfer_engine", {"init_info": info})

    async def close_transfer(self) -> None:
        """Have its workers leave the learner that they met."""
        await self._post("/shutdown_weight_transfer_engine", {})

    async def start_transfer(self, names: Sequence[str]) -> None:
        """Make it ready to take these tensors in place of its own; it must be paused."""
        await self._post("/collective_rpc", {"method": "begin_transfer", "kwargs": {"names": list(names)}})
        await self._post("/start_weight_update", {})

    async def update_chunk(self, info: Mapping[str, Any]) -> None:
        """Have it take some of them; answers when it has."""
        await self._post("/update_weights", {"update_info": info})

    async def finish_transfer(self, names: Sequence[str]) -> None:
        """Have it use what it took. What it did not take stays as it was."""
        await self._post("/finish_weight_update", {})
        await self._post("/collective_rpc", {"method": "end_transfer", "kwargs": {"names": list(names)}})

    async def label(self, policy_version: int) -> None:
        """Say which version the engine samples from now on; every token it answers with carries it."""
        await self._post("/update_weight_version", {"new_version": str(policy_version)})

    async def pause(self) -> None:
        """Freeze what runs, between two tokens, with its keys and values, which vLLM drops unless told otherwise."""
        await self._post("/pause?mode=keep&clear_cache=false", {})

    async def forget_kv_cache(self) -> None:
        """Drop all keys and values; frozen completions compute theirs anew when they go on."""
        await self._post("/reset_prefix_cache?reset_running_requests=true", {})

    async def resume(self) -> None:
        """Go on with what was frozen."""
        await self._post("/resume", {})

    async def read_version(self) -> str:
        """The label of the weights being served. It comes from the engine's loop, so an answer shows that it turns."""
        answer = _read_json(self.url, await self._http.get(f"{self.url}/weight_info"))
        if "weight_version" not in answer:
            raise GeneratorError(f"{self.url}: no weight_version in {json.dumps(answer)[:100]}")
        return str(answer["weight_version"])

    async def _generate(self, request: Request, plan: SamplingPlan, salt: str, *, greedy: bool) -> list[Completion]:
        parameters = {
            "n": 1 if greedy else plan.num_samples,
            "max_tokens": plan.max_tokens(self._config.max_new_tokens, greedy=greedy),
            "temperature": 0.0 if greedy else self._config.temperature,
            "top_p": 1.0,
            "top_k": -1,
            "seed": request.seed,
            "stop_token_ids": [self._tokenizer.eos_token_id],
            "logprobs": 0,
            "detokenize": False,
        }
        body = {
            "model": MODEL_NAME,
            "token_ids": list(request.prompt_ids),
            "sampling_params": parameters,
            # Reloading weights does not empty the prefix cache; a salt keeps versions apart.
            "cache_salt": f"{salt}-greedy" if greedy else salt,
        }
        answer = await self._post("/inference/v1/generate", body)
        try:
            choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
            return [self._read_choice(choice, request, index, greedy) for index, choice in enumerate(choices)]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise GeneratorError(f"{self.url}: unusable answer: {error!r}: {json.dumps(answer)[:200]}") from error

    def _read_choice(self, choice: Mapping[str, Any], request: Request, index: int, greedy: bool) -> Completion:
        if choice.get("finish_reason") == "abort":  # else it would be trained on as one that ran too long
            raise GeneratorError(f"{self.url}: a completion was aborted on the server")
        token_ids = tuple(int(token) for token in choice["token_ids"])
        versions = _read_versions(choice["weight_versions"], len(token_ids))
        return Completion(
            prompt_id=request.prompt_id,
            sample_index=index,
            is_greedy=greedy,
            prompt_ids=request.prompt_ids,
            token_ids=token_ids,
            sampling_logprobs=tuple(float(entry["logprob"]) for entry in choice["logprobs"]["content"]),
            text=decode_completion(self._tokenizer, token_ids),
            is_finished=bool(token_ids) and token_ids[-1] == self._tokenizer.eos_token_id,
            first_policy_version=versions[0],
            last_policy_version=versions[-1],
            token_policy_versions=() if versions[0] == versions[-1] else versions,
        )

    async def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        response = await self._http.post(f"{self.url}{path}", json=body)
        return _read_json(self.url, response)


async def _gather(calls: Sequence[Coroutine[Any, Any, list[Completion]]]) -> list[list[Completion]]:
    """All results; if one call fails none of the others goes on."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _read_versions(spans: Sequence[Mapping[str, Any]], num_tokens: int) -> tuple[int, ...]:
    """Each token's version, from spans of tokens that share one."""
    versions: list[int] = []
    for span in spans:
        start, end = int(span["start"]), int(span["end"])
        if start != len(versions) or end > num_tokens:
            raise ValueError(f"a version of tokens {start} to {end}, after {len(versions)} of {num_tokens}")
        versions += [int(span["version"])] * (end - start)
    if not versions or len(versions) != num_tokens:
        raise ValueError(f"{len(versions)} versions for {num_tokens} tokens")
    return tuple(versions)


def _read_json(url: str, response: httpx.Response) -> dict[str, Any]:
    if response.status_code != 200:
        raise GeneratorError(f"{url} answered {response.status_code}: {response.text[:300]}")
    if not response.content:
        return {}
    try:
        answer = response.json()
    except (ValueError, RecursionError) as error:
        raise GeneratorError(f"{url}: the answer is no JSON: {response.text[:100]!r}") from error
    return answer if isinstance(answer, dict) else {"answer": answer}
