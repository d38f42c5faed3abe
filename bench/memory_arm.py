"""One measurement for memory.py, in a process of its own: seconds of some updates, or bytes of one."""

import argparse
import dataclasses
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  what its code takes is no algorithm's
import torch
import yaml
from memory_counts import (
    ProcessMemory,
    SavedTensors,
    Watch,
    find_gradients,
    find_medians,
    find_moments,
    find_storages,
    find_weights,
    list_tensors,
    sum_except,
)

from stages.data.records import Completion
from stages.generation.config import GenerationConfig
from stages.generation.protocol import Request, SamplingPlan, Ticket
from stages.learner.ranks import ALONE, Ranks
from stages.rl import train
from stages.rl.config import RlConfig
from stages.rl.mini_batch import Sampled
from stages.rl.placement import Placement
from stages.rl.timeline import Timeline
from stages.rl.training import Training
from stages.scoring.load import read_score_range

PARAMS = Path(__file__).parents[1] / "params.yaml"


@dataclasses.dataclass(frozen=True)
class Arm:
    """What is measured; the names of its fields are memory.py's arguments."""

    model: str
    reward: str
    algorithm: str
    trainable_layers: str
    completions: int
    prompt_tokens: int
    completion_tokens: int
    micro_batch_tokens: int
    dtype: str
    threads: int
    updates: int
    warm_up: int
    what: str
    """seconds or bytes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arm", help="its fields as JSON")
    arm = Arm(**json.loads(parser.parse_args().arm))
    before_bytes = ProcessMemory().read_current()
    with tempfile.TemporaryDirectory(prefix="memory-") as name:
        config = make_config(arm)
        generation = GenerationConfig.model_validate(yaml.safe_load(PARAMS.read_text())["generation"])
        training = build_training(config, generation, Path(arm.model), Path(arm.reward), Path(name))
        # Of its samples online DPO trains on the best and the worst.
        num_trained = 2 if arm.algorithm == "online_dpo" else training.preparation.algorithm.num_samples
        if arm.completions % num_trained:
            raise SystemExit(f"--completions {arm.completions} is not a multiple of {num_trained} trained of a prompt")
        sampled = draw_batch(training, arm.completions // num_trained, arm.prompt_tokens, arm.completion_tokens)
        if arm.what == "seconds":
            measured = time_updates(training, sampled, arm)
        else:
            measured = measure_bytes(training, sampled, before_bytes)
    print(json.dumps(measured))


def time_updates(training: Training, sampled: list[Sampled], arm: Arm) -> dict[str, Any]:
    watch = Watch()
    for _ in range(arm.warm_up + arm.updates):
        update(watch_training(training, watch), sampled, watch)
    return {
        "seconds": find_medians(watch.rows[arm.warm_up :]),
        "cpu_seconds": find_medians(watch.cpu_rows[arm.warm_up :]),
        "all_seconds": watch.rows[arm.warm_up :],
        "all_cpu_seconds": watch.cpu_rows[arm.warm_up :],
        "scored_completions": sum(len(item.group) for item in sampled),
        "threads": torch.get_num_threads(),
    }


def measure_bytes(training: Training, sampled: list[Sampled], before_bytes: int) -> dict[str, Any]:
    """What is counted, and beside it what the process holds above what it held without any model."""
    watch = Watch()
    for _ in range(2):  # the first one makes the optimizer's state
        update(watch_training(training, watch), sampled, watch)
    return {
        "before_bytes": before_bytes,
        "between_updates_bytes": ProcessMemory().read_current() - before_bytes,
        "peak_bytes": {kind: peak - before_bytes for kind, peak in watch.peaks.items()},
        "bytes": count_bytes(training, sampled),
    }


def make_config(arm: Arm) -> RlConfig:
    """Section `rl` as committed, with the arm's algorithm in its defaults and all models in this process."""
    section = yaml.safe_load(PARAMS.read_text())["rl"]
    section |= {"algorithm": {"name": arm.algorithm}, "score_on": "learner", "reference_on": "learner"}
    section["learner"] |= {
        "lr": 1e-8,
        "schedule": "constant",
        "warmup_fraction": 0.0,
        "trainable_layers": yaml.safe_load(arm.trainable_layers),
        "dtype": arm.dtype,
        "micro_batch_tokens": arm.micro_batch_tokens,
    }
    return RlConfig.model_validate(section)


def build_training(
    config: RlConfig, generation: GenerationConfig, model: Path, reward: Path, workdir: Path, ranks: Ranks = ALONE
) -> Training:
    """The learner and what surrounds it, made by the stage's own code."""
    setting = train._Setting(
        inputs=train.PolicyInputs(workdir, model, reward),
        config=config,
        generation=generation,
        algorithm=train.make_algorithm(config, generation),
        placement=Placement((), "0"),
        prompts=train._Prompts([], []),
        missing_eos_score=read_score_range(reward)[0],
        workdir=workdir,
    )
    return train._make_training(setting, Timeline(workdir / "timeline.jsonl"), lambda *_: None, ranks)


def draw_batch(training: Training, num_prompts: int, prompt_tokens: int, completion_tokens: int) -> list[Sampled]:
    """Groups of random tokens, as a generator would have sampled them."""
    algorithm, vocabulary = training.preparation.algorithm, training.learner.model.config.vocab_size
    plan = SamplingPlan(algorithm.num_samples, algorithm.with_greedy)
    generator = torch.Generator().manual_seed(0)

    def draw(num: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, vocabulary, (num,), generator=generator).tolist())

    sampled = []
    for number in range(num_prompts):
        request = Request(str(number), draw(prompt_tokens), seed=number)
        tokens = [draw(completion_tokens) for _ in range(plan.num_completions)]
        group = [
            make_completion(request, index, index >= plan.num_samples, token_ids, -math.log(vocabulary))
            for index, token_ids in enumerate(tokens)
        ]
        sampled.append(Sampled(Ticket(number, request, plan), tuple(group)))
    return sampled


def make_completion(
    request: Request, index: int, is_greedy: bool, token_ids: tuple[int, ...], logprob: float
) -> Completion:
    return Completion(
        prompt_id=request.prompt_id,
        sample_index=0 if is_greedy else index,
        is_greedy=is_greedy,
        prompt_ids=request.prompt_ids,
        token_ids=token_ids,
        sampling_logprobs=(logprob,) * len(token_ids),
        text="",
        is_finished=True,
        first_policy_version=0,
        last_policy_version=0,
    )


def update(training: Training, sampled: list[Sampled], watch: Watch) -> None:
    """Score, prepare and train, as the loop does."""
    watch.start_update()
    with watch.phase("score"):
        scores = training.preparation.score(sampled)
    mini_batch = training.preparation.prepare(sampled, scores, (0, 0, 0))
    training.train(mini_batch, [0] * len(scores))


def watch_training(training: Training, watch: Watch) -> Training:
    """The same, with its phases watched."""
    preparation = dataclasses.replace(
        training.preparation,
        reference=watch.watch(training.preparation.reference, "compute", "reference"),
        value=watch.watch(training.preparation.value, "compute", "values"),
    )
    return dataclasses.replace(
        training,
        preparation=preparation,
        learner=watch.watch(training.learner, "update", "learn policy"),
        value_learner=watch.watch(training.value_learner, "update", "learn value"),
    )


def list_learners(training: Training) -> dict[str, Any]:
    learners = {"policy": training.learner, "value model": training.value_learner}
    return {name: learner for name, learner in learners.items() if learner is not None}


def list_models(training: Training) -> dict[str, Any]:
    models = {"reward model": training.preparation.scorer._model}
    if training.preparation.reference is not None:
        models["reference"] = training.preparation.reference.model
    return {name: learner.model for name, learner in list_learners(training).items()} | models


def count_bytes(training: Training, sampled: list[Sampled]) -> dict[str, dict[str, int]]:
    """Components of each model, in bytes, with its parameters; makes one more update."""
    learners = list_learners(training)
    gradients = {name: note_gradients(learner._engine) for name, learner in learners.items()}
    saved = {name: SavedTensors(learner.model) for name, learner in learners.items()}
    hooked = {name: Hooked(learner, saved[name].hooks()) for name, learner in learners.items()}
    under_hooks = dataclasses.replace(training, learner=hooked["policy"], value_learner=hooked.get("value model"))
    update(under_hooks, sampled, Watch())
    described = {name: describe_parameters(model) for name, model in list_models(training).items()}
    for name, learner in learners.items():
        optimizer = learner._engine.optimizer
        weights, moments = find_weights(learner.model), find_moments(optimizer)
        described[name] |= {
            "moments": sum(moments.values()),
            "copies": sum_except(find_storages(list_tensors(optimizer)), weights, moments),
            "gradients": sum(gradients[name]),
            "activations": saved[name].peak,
            "cast_weights": saved[name].cast_weights,
        }
    return described


def describe_parameters(model: Any) -> dict[str, int]:
    parameters = list(model.parameters())
    return {
        "parameters": sum(item.numel() for item in parameters),
        "trained_parameters": sum(item.numel() for item in parameters if item.requires_grad),
        "weights": sum(find_weights(model).values()),
    }


def note_gradients(engine: Any) -> list[int]:
    """A list that is filled with the gradients' bytes right before the engine's step."""
    noted: list[int] = []
    step = engine.step

    def note_and_step() -> None:
        noted.append(sum(find_gradients(engine).values()))
        step()

    engine.step = note_and_step
    return noted


@dataclasses.dataclass(frozen=True)
class Hooked:
    """A learner that trains under hooks."""

    learner: Any
    hooks: Any

    @property
    def updates(self) -> int:
        return int(self.learner.updates)

    def update(self, *arguments: Any) -> Any:
        with self.hooks:
            return self.learner.update(*arguments)


if __name__ == "__main__":
    main()
