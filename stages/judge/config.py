"""Section `judge` of params.yaml: the held-out comparison."""

from typing import Literal

from pydantic import Field, PositiveInt

from stages.common.config import Section


class JudgeConfig(Section):
    """Policy and SFT model answer the same held-out prompts; scorers compare the answers."""

    samples_per_prompt: PositiveInt = 1
    """Completions of each model per held-out prompt."""
    seed: int = Field(default=0, ge=0)
    """Of the sampling and of the bootstrap."""
    micro_batch_tokens: PositiveInt = 4096
    """Padded tokens of one forward pass; bounds memory, changes no result beyond rounding."""
    num_shown: PositiveInt = 12
    """Prompts shown side by side in artifacts/samples.md."""
    dtype: Literal["bf16", "fp32"] = "fp32"
    """Compute type of logprobs, KL and the reward model. Differences of bf16 logprobs are mostly rounding."""
