"""Section `judge` of params.yaml: the held-out comparison, and the LLM judge if there is one."""

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator, model_validator

from stages.common.config import Section


class JudgeConfig(Section):
    """Policy and SFT model answer the same held-out prompts; scorers, and a language model, compare the answers."""

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

    against: str = Field(default="sft", min_length=1)
    """Whom the LLM judge compares the policy with: sft, references (the task's own demonstrations), the id of an MLflow
    run, or a file (.parquet of stage sample_policy, .json in AlpacaEval's format)."""
    model: str | None = Field(default=None, min_length=1)
    """The LLM judge, as its endpoint names it. null: no LLM judge, only gold scorer and reward model."""
    base_url: str = "https://api.openai.com/v1"
    """Any OpenAI-compatible endpoint; the key is read from OPENAI_API_KEY and from nowhere else."""
    prompt: str = Field(default="review", pattern=r"[a-z0-9_]+")
    """Rubric: stages/judge/prompts/<mode>_<prompt>.txt."""
    mode: Literal["pairwise", "single"] = "pairwise"
    """pairwise: which of two is better, asked in both orders. single: each completion gets 1 … 10 points."""
    structured: Literal["auto", "schema", "text"] = "auto"
    """Whether the endpoint is held to a JSON schema; auto: if it can be."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 0.0
    """Of the judge; null: not sent, for models that refuse it."""
    max_reply_tokens: PositiveInt = 512
    """Length limit of the judge's reply; one that is cut does not parse."""
    concurrency: PositiveInt = 8
    """Calls in flight at most."""
    call_timeout_s: PositiveFloat = 60.0
    """Of one call."""
    total_timeout_s: PositiveFloat = 7200.0
    """Of all judging of one model's samples."""
    max_attempts: PositiveInt = 6
    """Tries of one call that is refused for a time, fails or gets no answer."""
    max_calls: PositiveInt = 10_000
    """Requests sent at most for one evaluation, over restarts, failed ones included."""
    max_cost_usd: PositiveFloat | None = None
    """Cost at most for one evaluation, over restarts; needs both prices."""
    usd_per_million_prompt_tokens: NonNegativeFloat | None = None
    """Price of what the judge reads."""
    usd_per_million_completion_tokens: NonNegativeFloat | None = None
    """Price of what the judge writes."""
    max_error_fraction: float = Field(default=0.05, ge=0, le=1)
    """Share of questions without a usable reply above which the stage fails instead of reporting the rest."""

    @field_validator("base_url")
    @classmethod
    def _check_base_url(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"judge.base_url={url!r}: must be an http:// or https:// address")
        if parts.username or parts.password:
            raise ValueError("judge.base_url: holds a name or password; the key belongs into OPENAI_API_KEY")
        return url.rstrip("/")

    @model_validator(mode="after")
    def _check_prices(self) -> "JudgeConfig":
        prices = (self.usd_per_million_prompt_tokens, self.usd_per_million_completion_tokens)
        if self.max_cost_usd is not None and None in prices:
            raise ValueError(
                f"judge.max_cost_usd={self.max_cost_usd}: needs judge.usd_per_million_prompt_tokens and "
                "judge.usd_per_million_completion_tokens, which say what a call costs"
            )
        return self
