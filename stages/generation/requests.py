"""Prompts become requests: token ids, a seed of their own, and the length limit."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from stages.data.records import Prompt
from stages.data.seeds import derive_seed
from stages.data.text import encode_prompt
from stages.generation.config import GenerationConfig
from stages.generation.protocol import Request


def make_requests(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, config: GenerationConfig, seed: int
) -> tuple[list[Request], int]:
    """Prompts as requests with seeds of their own, and how many were too long and dropped."""
    encoded = [(prompt, encode_prompt(tokenizer, prompt)) for prompt in prompts]
    requests = [
        Request(prompt.prompt_id, ids, derive_seed(seed, prompt.prompt_id))
        for prompt, ids in encoded
        if len(ids) <= config.max_prompt_tokens
    ]
    return requests, len(encoded) - len(requests)


def spread(requests: Sequence[Request], size: int) -> list[Request]:
    """`size` of them, evenly spaced: prompts of a group stand together, and the first ones would be of few groups."""
    size = min(size, len(requests))
    return [requests[index * len(requests) // size] for index in range(size)]
