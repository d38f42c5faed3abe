"""Our half of the RL comparison in bench/trl_agreement.py: each algorithm on one mini-batch, by the code that trains.

The completions are stale: another policy, `sampler`, gave their sampling log-probabilities. Shapes: N completions,
T tokens of the longest one.
"""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from agreement import take_gradients
from pydantic import TypeAdapter
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from stages.common.metrics import Mean, merge_means
from stages.data.batches import collate
from stages.data.records import Completion
from stages.data.text import TokenSequence
from stages.generation.protocol import Group, Request, SamplingPlan, Ticket
from stages.learner.engine import LossFunction
from stages.models.load import load_policy, move, select_device
from stages.models.reward_model import init_reward_model
from stages.rl.algorithm_config import AlgorithmConfig
from stages.rl.algorithms import ALGORITHMS
from stages.rl.algorithms.advantages import whiten
from stages.rl.algorithms.ppo import Ppo
from stages.rl.algorithms.protocol import Algorithm
from stages.rl.mini_batch import MiniBatch, Preparation, Sampled
from stages.rl.records import LossInputs, Predictions, Totals
from stages.rl.rollouts import MicroBatch, Reference, compute_loss, join_inputs
from stages.rl.scoring import ScoredGroup
from stages.rl.value import ValueModel, compute_values

NUM_PROMPTS = 4
NUM_SAMPLES = 4
MAX_NEW_TOKENS = 10
TEMPERATURE = 0.7
MISSING_EOS_SCORE = -3.0
"""Of unfinished completions; below all others, as `rl.missing_eos_score` is."""
DTYPE = "fp32"

POLICIES = ("sampler", "proximal", "reference")
"""The learner's weights with noise: what sampled, the learner before the mini-batch, the frozen SFT model."""

UNTRUNCATED = {"kind": "sequence_tis", "max_weight": 1e6}
DR_GRPO = {"scale": "none", "kl_loss_coef": 0, "normaliser": {"by": "constant", "tokens": MAX_NEW_TOKENS}}
ONLINE_DPO = {"name": "online_dpo", "samples_per_prompt": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "rloo": {"name": "rloo", "correction": UNTRUNCATED},
    "rloo_token_tis": {"name": "rloo"},
    "proximal_rloo": {"name": "proximal_rloo"},
    "proximal_rloo_without_kl": {"name": "proximal_rloo", "kl_coef": 0},
    "grpo": {"name": "grpo"},
    "grpo_without_kl": {"name": "grpo", "kl_loss_coef": 0},
    "grpo_per_token": {"name": "grpo", "normaliser": {"by": "per_token"}},
    "grpo_decoupled": {"name": "grpo", "correction": {"kind": "decoupled"}},
    "dr_grpo": {"name": "grpo", **DR_GRPO},
    "online_dpo": ONLINE_DPO,
    "online_dpo_ipo": {**ONLINE_DPO, "loss": "ipo"},
}
"""What params.yaml says under `rl.algorithm`."""
AT_TEMPERATURE_1 = ("proximal_rloo", "grpo", "online_dpo", "online_dpo_ipo")
"""Recorded again, with the learner's and the reference's logits as they are."""
PPO = {"name": "ppo", "samples_per_prompt": NUM_SAMPLES, "gamma": 0.98}


def record_rl(
    directory: Path, model_path: Path, sequences: Sequence[Sequence[TokenSequence]], *, seed: int, noise: float
) -> dict[str, Any]:
    """Write models and gradients into `directory`; the batch and all losses.

    Args:
        directory: exists.
        model_path: the learner's weights.
        sequences: of each prompt, what its completions are cut from.
        seed: of lengths, scores and noise.
        noise: how far the other models are from the learner; see `add_noise`.
    """
    models = draw_models(directory, model_path, seed, noise)
    rng = random.Random(seed)
    groups = [
        add_sampling_logprobs(draw_group(number, items, rng), models["sampler"])
        for number, items in enumerate(sequences)
    ]
    batch = Batch(groups, [tuple(draw_score(item, rng) for item in group) for group in groups])
    recorder = Recorder(directory, models)
    results = {key: recorder.record(key, settings, batch) for key, settings in SETTINGS.items()}
    hotter = replace(recorder, temperature=1.0)
    results |= {f"{key}_at_1": hotter.record(f"{key}_at_1", SETTINGS[key], batch) for key in AT_TEMPERATURE_1}
    rows = [
        asdict(item) | {"score": score}
        for group, scores in zip(batch.groups, batch.scores, strict=True)
        for item, score in zip(group, scores, strict=True)
    ]
    return {
        "rows": rows,
        "num_samples": NUM_SAMPLES,
        "max_new_tokens": MAX_NEW_TOKENS,
        "temperature": TEMPERATURE,
        "noise": noise,
        "ppo": PPO,
        "results": results | record_ppo(recorder, batch),
    }


# The batch


@dataclass(frozen=True)
class Batch:
    """Completions of each prompt and their scores."""

    groups: list[Group]
    scores: list[tuple[float, ...]]
    reference_logprobs: list[tuple[tuple[float, ...], ...]] | None = None
    """None: computed where they are needed."""

    def take(self, num_samples: int) -> "Batch":
        """So many samples of each prompt."""
        return Batch([group[:num_samples] for group in self.groups], [scores[:num_samples] for scores in self.scores])

    def sampled(self) -> list[Sampled]:
        """As it comes from the generator."""
        plan = SamplingPlan(len(self.groups[0]))
        references = self.reference_logprobs or [None] * len(self.groups)
        return [
            Sampled(
                Ticket(number, Request(str(number), group[0].prompt_ids, seed=0), plan),
                group,
                ScoredGroup(scores, reference),
            )
            for number, (group, scores, reference) in enumerate(zip(self.groups, self.scores, references, strict=True))
        ]


def draw_models(directory: Path, model_path: Path, seed: int, noise: float) -> dict[str, PreTrainedModel]:
    """The learner, the other policies and the value model now and earlier; all but the learner's are saved."""
    models = {"learner": load_policy(model_path, torch.float32)}
    models |= {name: load_policy(model_path, torch.float32) for name in POLICIES}
    models |= {name: init_reward_model(model_path, torch.float32, seed) for name in ("value", "old_value")}
    for number, name in enumerate((*POLICIES, "old_value")):
        add_noise(models[name], noise, torch.Generator().manual_seed(1000 * seed + number))
    for name in models.keys() - {"learner"}:
        models[name].save_pretrained(directory / name)
    return {name: move(model, select_device()) for name, model in models.items()}


@torch.no_grad()
def add_noise(model: PreTrainedModel, noise: float, generator: torch.Generator) -> None:
    """Move every weight by a share of its tensor's standard deviation."""
    for parameter in model.parameters():
        parameter += noise * parameter.std() * torch.randn(parameter.shape, generator=generator)


def draw_group(number: int, sequences: Sequence[TokenSequence], rng: random.Random) -> Group:
    """One prompt's completions, cut to different lengths; one of them is unfinished."""
    return tuple(
        cut_completion(number, sample, sequence, None if sample == number % NUM_SAMPLES else rng)
        for sample, sequence in enumerate(sequences)
    )


def cut_completion(number: int, sample: int, sequence: TokenSequence, rng: random.Random | None) -> Completion:
    """Cut at a drawn length and finished by EOS; without `rng` at the length limit and so unfinished."""
    *token_ids, eos = sequence.completion_ids
    kept = (*token_ids[: rng.randrange(MAX_NEW_TOKENS)], eos) if rng else tuple(token_ids[:MAX_NEW_TOKENS])
    return Completion(
        prompt_id=str(number),
        sample_index=sample,
        is_greedy=False,
        prompt_ids=sequence.prompt_ids,
        token_ids=kept,
        sampling_logprobs=(),
        text="",
        is_finished=rng is not None,
        first_policy_version=0,
        last_policy_version=0,
    )


def add_sampling_logprobs(group: Group, sampler: PreTrainedModel) -> Group:
    """What the sampler would have reported."""
    rows = zip(group, compute_rows(sampler, group), strict=True)
    return tuple(replace(item, sampling_logprobs=logprobs) for item, logprobs in rows)


def compute_rows(model: PreTrainedModel, group: Group) -> list[tuple[float, ...]]:
    """Log-probability of each token of each completion, in nats."""
    sequences = collate([TokenSequence(item.prompt_ids, item.token_ids) for item in group], select_device())
    rows = Reference(model, DTYPE, TEMPERATURE).compute(sequences)
    return [tuple(row[: len(item.token_ids)].tolist()) for row, item in zip(rows, group, strict=True)]


def draw_score(completion: Completion, rng: random.Random) -> float:
    """Around 0, with the missing-EOS rule."""
    score = rng.uniform(-2, 2)
    return score if completion.is_finished else MISSING_EOS_SCORE


# The algorithms


def make_algorithm(settings: dict[str, Any]) -> Algorithm:
    """As the RL stage does from params.yaml."""
    config: Any = TypeAdapter(AlgorithmConfig).validate_python(settings)
    return ALGORITHMS[config.name](**config.model_dump(exclude={"name", "value_lr"}))


@dataclass(frozen=True)
class Recorder:
    """Computes updates without making them, and keeps what they would be made of."""

    directory: Path
    models: dict[str, PreTrainedModel]
    temperature: float = TEMPERATURE

    def record(self, key: str, settings: dict[str, Any], batch: Batch) -> dict[str, float]:
        """Loss and metrics of the policy; its gradients go into `<key>.safetensors`."""
        algorithm = make_algorithm(settings)
        mini_batch = self.prepare(batch.take(algorithm.num_samples), algorithm)
        if algorithm.num_samples == NUM_SAMPLES:
            self.save_advantages(key, mini_batch)
        return self.record_policy(key, mini_batch, algorithm)

    def prepare(self, batch: Batch, algorithm: Algorithm) -> MiniBatch:
        """Micro-batches with all they need, as in training."""
        preparation = Preparation(
            algorithm=algorithm,
            scorer=None,
            missing_eos_score=MISSING_EOS_SCORE,
            reference=self._reference("reference"),
            learner=self._reference("proximal"),
            max_tokens=4 * max(len(item.prompt_ids) + len(item.token_ids) for group in batch.groups for item in group),
            value=ValueModel(self.models["old_value"], DTYPE),
        )
        sampled = batch.sampled()
        mini_batch = preparation.prepare(sampled, preparation.score(sampled), place=(0, 0, 0))
        assert mini_batch is not None
        return mini_batch

    def save_advantages(self, key: str, mini_batch: MiniBatch) -> None:
        """Advantages of each token, completion after completion as they were sampled. [N, T]"""
        starts = list(accumulate((len(item.sequences) for item in mini_batch.micro_batches), initial=0))
        places = [
            starts[row.micro_batch] + row.place
            for row in mini_batch.rows
            if row.micro_batch is not None and row.place is not None
        ]
        joined = join_inputs([item.inputs for item in mini_batch.micro_batches])
        save_file({"advantages": joined.advantages[places].cpu()}, self.directory / f"{key}-advantages.safetensors")

    def record_policy(self, key: str, mini_batch: MiniBatch, algorithm: Algorithm) -> dict[str, float]:
        """The same of a mini-batch that is prepared."""
        loss = partial(
            compute_loss, algorithm=algorithm, totals=mini_batch.totals, reference=self._reference("reference")
        )
        return self._record_update(key, self.models["learner"], mini_batch, loss)

    def record_value_model(self, key: str, mini_batch: MiniBatch, algorithm: Algorithm) -> dict[str, float]:
        """The same for the value model."""
        value_loss = algorithm.value_model
        assert value_loss is not None

        def loss(model: PreTrainedModel, batch: MicroBatch) -> tuple[Tensor, dict[str, Mean]]:
            return value_loss.compute_loss(compute_values(model, batch.sequences), batch.inputs, mini_batch.totals)

        return self._record_update(key, self.models["value"], mini_batch, loss)

    def _reference(self, name: str) -> Reference:
        return Reference(self.models[name], DTYPE, self.temperature)

    def _record_update(
        self, key: str, model: PreTrainedModel, mini_batch: MiniBatch, loss: LossFunction[MicroBatch]
    ) -> dict[str, float]:
        model.zero_grad()
        total, parts = 0.0, []
        for micro_batch in mini_batch.micro_batches:
            part, metrics = loss(model, micro_batch)
            part.backward()
            total += part.item()
            parts.append(metrics)
        save_file(take_gradients(model), self.directory / f"{key}.safetensors")
        means = {name: mean.value for name, mean in merge_means(parts).items()}
        return {"loss": total, "num_micro_batches": len(mini_batch.micro_batches)} | means


# PPO


def record_ppo(recorder: Recorder, batch: Batch) -> dict[str, dict[str, float]]:
    """Ours, and ours with the lines in which TRL's differs."""
    ppo = make_algorithm(PPO)
    assert isinstance(ppo, Ppo)
    extended = extend(batch, recorder.models["reference"])
    num_tokens = sum(len(item.token_ids) for group in batch.groups for item in group)
    results: dict[str, dict[str, float]] = {}
    for key, rows, algorithm in (
        ("ppo", batch, ppo),
        ("ppo_longer", extended, TrlPpo(**vars(ppo), num_trained_tokens=num_tokens, is_unbiased=False)),
        ("ppo_as_trl", extended, TrlPpo(**vars(ppo), num_trained_tokens=num_tokens, is_unbiased=True)),
    ):
        recorder.save_advantages(key, recorder.prepare(rows, replace(algorithm, whiten_advantages=False)))
        mini_batch = recorder.prepare(rows, algorithm)
        results[key] = recorder.record_policy(key, mini_batch, algorithm)
        results[f"{key}_value"] = recorder.record_value_model(f"{key}_value", mini_batch, algorithm)
    return results


def extend(batch: Batch, reference: PreTrainedModel) -> Batch:
    """Completions that are not of full length get a further token: TRL's score stands there, and a value.

    Its log-probabilities are 0, and no sampled token's are: that is how `TrlPpo` knows it.
    """
    longest = max(len(item.token_ids) for group in batch.groups for item in group)

    def lengthen(values: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*values, 0)[:longest]

    groups = [
        tuple(
            replace(item, token_ids=lengthen(item.token_ids), sampling_logprobs=lengthen(item.sampling_logprobs))
            for item in group
        )
        for group in batch.groups
    ]
    references = [tuple(map(lengthen, compute_rows(reference, group))) for group in batch.groups]
    return Batch(groups, batch.scores, references)


@dataclass(frozen=True, kw_only=True)
class TrlPpo(Ppo):
    """PPO on completions with the token that `extend` adds: it has a value and the score, but is not trained on."""

    num_trained_tokens: int
    is_unbiased: bool
    """True if the variance of advantages is divided by n − 1, as TRL's whitening does."""

    def compute_advantages(self, inputs: LossInputs) -> tuple[LossInputs, dict[str, Mean]]:
        """Whitened over the sampled tokens."""
        plain = replace(self, whiten_advantages=False)
        completed, metrics = Ppo.compute_advantages(plain, inputs)
        if self.whiten_advantages:
            share = 1 - self.is_unbiased / self.num_trained_tokens
            advantages = whiten(completed.advantages, is_sampled(inputs)) * share**0.5
            completed = replace(completed, advantages=advantages)
        return completed, metrics

    def compute_loss(
        self, predictions: Predictions, inputs: LossInputs, totals: Totals
    ) -> tuple[Tensor, dict[str, Mean]]:
        """Of the sampled tokens."""
        inputs = replace(inputs, completion_mask=is_sampled(inputs))
        return super().compute_loss(predictions, inputs, replace(totals, num_tokens=self.num_trained_tokens))


def is_sampled(inputs: LossInputs) -> Tensor:
    """The completion mask without the token that `extend` added. [B, T]"""
    return inputs.completion_mask & (inputs.sampling_logprobs != 0)
