"""Section `generation` of params.yaml: what samples completions, for every stage that needs them."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from stages.common.config import Section


class GenerationConfig(Section):
    """The generator and the distribution it samples from.

    There is no top_p or top_k: log-probabilities must be of the distribution that was sampled, and the
    estimators of both papers are biased when it is a truncated one.
    """

    engine: Literal["vllm", "transformers"] = "vllm"
    """vllm: a server this project starts and ends itself. transformers: in process, slow, exact."""
    temperature: PositiveFloat = 1.0
    """Logits are divided by it, when sampling and in every logprob."""
    max_new_tokens: PositiveInt
    """Tokens after which a completion is cut; it then counts as unfinished."""
    max_prompt_tokens: PositiveInt
    """Longer prompts are dropped and counted."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Compute type of the generator."""
    max_num_seqs: PositiveInt = 128
    """Sequences the generator works on at once."""
    cpu_cores: str = "0-1"
    """vLLM on CPU: the cores its threads are bound to, such as 0 or 0-1."""
    kv_cache_gib: PositiveInt = 1
    """vLLM on CPU: memory for keys and values, in GiB."""
    start_timeout_s: PositiveInt = 300
    """Seconds a server may take until it answers."""
    request_timeout_s: PositiveInt = 600
    """Seconds one batch of requests may take."""
    engine_args: tuple[str, ...] = Field(default=())
    """Further command-line arguments of the vLLM server, such as --tensor-parallel-size=2."""
