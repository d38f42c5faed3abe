"""A generator in this process: slow, deterministic, the bit-exact one for tests and small runs."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stages.common.progress import progress
from stages.data.records import Completion
from stages.data.text import decode_completion
from stages.generation.config import GenerationConfig
from stages.generation.protocol import Group, Request, SamplingPlan, require_complete
from stages.models.load import freeze, load_policy


class TransformersGenerator:
    """Samples prompt by prompt with a key-value cache; a prompt's samples form one batch.

    Each sample draws from a generator of its own, seeded by the request, so results depend neither on the
    other prompts nor on any global state.
    """

    def __init__(
        self,
        model: Path,
        config: GenerationConfig,
        *,
        tokenizer: PreTrainedTokenizerBase,
        policy_version: int,
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._eos: int = tokenizer.eos_token_id
        self._model: PreTrainedModel
        self.publish(model, policy_version)

    def publish(self, weights: Path, policy_version: int) -> None:
        """Load a model directory."""
        self._model = load_policy(weights, torch.bfloat16 if self._config.dtype == "bf16" else torch.float32)
        freeze(self._model)
        self._version = policy_version

    def close(self) -> None:
        """Nothing to end: it lives in this process."""

    def generate(self, requests: Sequence[Request], plan: SamplingPlan) -> list[Group]:
        """One prompt after the other; see `Generator.generate`."""
        groups = [self._generate_group(item, plan) for item in progress(requests, "sampling", unit="prompt")]
        pairs = zip(groups, requests, strict=True)
        return [require_complete(group, request, plan, self._config.max_new_tokens) for group, request in pairs]

    @torch.no_grad()
    def _generate_group(self, request: Request, plan: SamplingPlan) -> Group:
        num_rows = plan.num_samples + int(plan.with_greedy)
        draws = [torch.Generator().manual_seed((request.seed + k) % 2**63) for k in range(plan.num_samples)]
        tokens: list[list[int]] = [[] for _ in range(num_rows)]
        logprobs: list[list[float]] = [[] for _ in range(num_rows)]
        ids, cache = torch.tensor([request.prompt_ids] * num_rows), None
        for _ in range(self._config.max_new_tokens):
            output = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            scores = torch.log_softmax(output.logits[:, -1].float() / self._config.temperature, dim=-1)  # [rows, V]
            chosen = self._choose(scores, draws)  # [rows]
            for row, token in enumerate(chosen.tolist()):
                if not tokens[row] or tokens[row][-1] != self._eos:
                    tokens[row].append(token)
                    logprobs[row].append(scores[row, token].item())
            if all(row[-1] == self._eos for row in tokens):
                break
            ids = chosen[:, None]
        return tuple(
            self._completion(request, row, row >= plan.num_samples, tokens[row], logprobs[row])
            for row in range(num_rows)
        )

    def _choose(self, scores: Tensor, draws: Sequence[torch.Generator]) -> Tensor:
        """A sample for each generator in `draws`, the most likely token for rows beyond them. [rows, V] -> [rows]"""
        chosen = scores.argmax(dim=-1)
        for row, draw in enumerate(draws):
            chosen[row] = torch.multinomial(scores[row].exp(), 1, generator=draw)[0]
        return chosen

    def _completion(
        self, request: Request, row: int, greedy: bool, token_ids: list[int], logprobs: list[float]
    ) -> Completion:
        return Completion(
            prompt_id=request.prompt_id,
            sample_index=0 if greedy else row,
            is_greedy=greedy,
            prompt_ids=request.prompt_ids,
            token_ids=tuple(token_ids),
            sampling_logprobs=tuple(logprobs),
            text=decode_completion(self._tokenizer, token_ids),
            is_finished=token_ids[-1] == self._eos,
            first_policy_version=self._version,
            last_policy_version=self._version,
        )
