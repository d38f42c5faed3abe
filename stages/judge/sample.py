"""Policy and SFT model sample the same held-out prompts with the same seeds, and are measured on the samples."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.common.errors import GeneratorError, InputError
from stages.data.records import Completion, Prompt
from stages.data.text import TokenSequence
from stages.generation.config import GenerationConfig
from stages.generation.protocol import Generator, Request, SamplingPlan, WeightsUpdate, generate
from stages.generation.requests import make_requests
from stages.generation.start import GeneratorSettings, start_generator
from stages.judge.config import JudgeConfig
from stages.judge.measure import Predictions, predict_completions, sum_kl, sum_logprobs
from stages.models.load import load_frozen, load_tokenizer, require_model_directory

Columns = dict[str, list[float]]
"""Columns of a samples file besides the completions: one number per completion, in nats."""


MAX_SAMPLING_GAP = 0.05
"""Nats a token between the log-probability of whole completions in the generator and in the model. bf16 rounding
gives below 0.01, the wrong one of two models that are 3 nats apart above 0.1."""


@dataclass(frozen=True)
class Models:
    """The two model directories that are compared."""

    sft: Path
    """The model the policy was trained from; its tokenizer is used."""
    policy: Path
    policy_version: int
    """Updates applied to the policy."""


@dataclass(frozen=True)
class Samples:
    """What both models produced; `sft[i]` and `policy[i]` share prompt, sample index and seed."""

    sft: list[Completion]
    policy: list[Completion]
    num_prompts: int
    num_prompts_too_long: int

    def metrics(self) -> dict[str, float]:
        """What metrics/samples.json holds."""
        return {
            "num_prompts": self.num_prompts,
            "num_prompts_too_long": self.num_prompts_too_long,
            "num_completions": len(self.policy),
            "finished_fraction_sft": sum(item.is_finished for item in self.sft) / len(self.sft),
            "finished_fraction_policy": sum(item.is_finished for item in self.policy) / len(self.policy),
        }


def read_policy_version(policy: Path) -> int:
    """Updates applied to the policy, from the `version.json` it was published with; 1 for one from elsewhere.

    Any number but 0, the SFT model's, keeps the generator from mixing up the two models' caches.
    """
    version = policy / "version.json"
    if not version.exists():
        return 1
    return int(json.loads(version.read_text(encoding="utf-8"))["policy_version"])


def sample_both(
    prompts: Sequence[Prompt], models: Models, config: JudgeConfig, generation: GenerationConfig, workdir: Path
) -> Samples:
    """Completions of the SFT model, then of the policy, from one generator that is started once.

    Args:
        prompts: the held-out ones.
        models: both model directories.
        config: section `judge`.
        generation: section `generation`.
        workdir: where servers write their logs.

    Raises:
        InputError: no model where one is expected, or no prompt is within `max_prompt_tokens`.
        GeneratorError: the generator died or answered something unusable.
    """
    return sample_versions(prompts, [models], config, generation, workdir)[0]


def sample_versions(
    prompts: Sequence[Prompt],
    versions: Sequence[Models],
    config: JudgeConfig,
    generation: GenerationConfig,
    workdir: Path,
) -> list[Samples]:
    """As `sample_both`, for several policies of one SFT model, which samples once.

    Raises:
        InputError, GeneratorError: see `sample_both`.
    """
    for models in versions:  # before the generator starts, which takes a minute
        require_model_directory(models.policy)
    sft = versions[0].sft
    requests, num_too_long = make_requests(prompts, load_tokenizer(sft), generation, config.seed)
    if not requests:
        raise InputError(
            f"artifacts/data: no held-out prompt fits into generation.max_prompt_tokens={generation.max_prompt_tokens}"
        )
    plan = SamplingPlan(config.samples_per_prompt)
    settings = GeneratorSettings(seed=config.seed)
    with start_generator(sft, generation, log_dir=workdir, settings=settings) as generator:
        from_sft = _sample(generator, requests, plan)
        samples = []
        for models in versions:
            generator.publish(WeightsUpdate(models.policy_version, models.policy))
            from_policy = _sample(generator, requests, plan)
            samples.append(Samples(from_sft, from_policy, len(requests), num_too_long))
    return samples


def measure_samples(
    samples: Samples, models: Models, config: JudgeConfig, temperature: float
) -> tuple[Columns, Columns]:
    """Columns for the SFT model's and for the policy's completions; one model is in memory at a time.

    `policy_logprob` and `sft_logprob` are of the distributions that were sampled, `sft_logprob_at_1` is of the SFT
    model at temperature 1, which perplexity needs. `kl_exact`, for the policy's completions alone, is
    KL(policy ‖ SFT) summed over positions. All sum over completion tokens and are in nats.

    Args:
        samples: of both models.
        models: both model directories.
        config: section `judge`.
        temperature: at which completions were sampled.

    Raises:
        GeneratorError: completions that their model did not sample.
    """
    on_sft, on_policy = _predict(models.sft, [samples.sft, samples.policy], config)
    sft_columns, policy_columns = (
        {
            "sft_logprob": sum_logprobs(predictions, temperature),
            "sft_logprob_at_1": sum_logprobs(predictions, 1.0),
        }
        for predictions in (on_sft, on_policy)
    )
    del on_sft
    reference = on_policy
    on_sft, on_policy = _predict(models.policy, [samples.sft, samples.policy], config)
    sft_columns["policy_logprob"] = sum_logprobs(on_sft, temperature)
    policy_columns["policy_logprob"] = sum_logprobs(on_policy, temperature)
    policy_columns["kl_exact"] = sum_kl(on_policy, reference, temperature)
    require_sampled_by(models.sft, samples.sft, sft_columns["sft_logprob"])
    require_sampled_by(models.policy, samples.policy, policy_columns["policy_logprob"])
    return sft_columns, policy_columns


def require_sampled_by(model: Path, completions: Sequence[Completion], logprobs: Sequence[float]) -> None:
    """Refuse completions that were not sampled by the model they are said to be of.

    Args:
        model: directory, for the message.
        completions: with the generator's log-probabilities.
        logprobs: of each completion under the model, at the sampling temperature, in nats.

    Raises:
        GeneratorError: the two differ by more than `MAX_SAMPLING_GAP` a token on average.
    """
    pairs = zip(completions, logprobs, strict=True)
    gap = sum(abs(logprob - sum(item.sampling_logprobs)) for item, logprob in pairs)
    gap /= sum(len(item.token_ids) for item in completions)
    if not gap <= MAX_SAMPLING_GAP:
        raise GeneratorError(
            f"{model}: the generator's logprobs of its completions differ from the model's by {gap:.3f} nats a token, "
            f"above {MAX_SAMPLING_GAP}: it did not sample from these weights"
        )


def _sample(generator: Generator, requests: Sequence[Request], plan: SamplingPlan) -> list[Completion]:
    return [completion for group in generate(generator, requests, plan) for completion in group]


def _predict(path: Path, sets: Sequence[Sequence[Completion]], config: JudgeConfig) -> list[Predictions]:
    """Load a model, run it over sets of completions, and let it go."""
    model = load_frozen(path, config.dtype)
    return [
        predict_completions(
            model,
            [TokenSequence(item.prompt_ids, item.token_ids) for item in completions],
            micro_batch_tokens=config.micro_batch_tokens,
            dtype=config.dtype,
        )
        for completions in sets
    ]
