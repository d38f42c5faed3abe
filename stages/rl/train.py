"""Puts the RL loop's parts together and publishes its results."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from stages.common.errors import InputError, SettingError
from stages.data.seeds import derive_seed
from stages.data.store import read_prompts
from stages.generation.config import GenerationConfig
from stages.generation.requests import make_requests
from stages.generation.start import start_generator
from stages.learner.engine import Learner
from stages.learner.logprobs import require_plain_head
from stages.models.load import freeze, load_policy, load_tokenizer, move, select_device, select_trainable
from stages.rl.algorithms import ALGORITHMS
from stages.rl.config import RlConfig
from stages.rl.loop import Loop, Parts, Progress
from stages.rl.rollouts import Reference
from stages.rl.scorer import resolve_missing_eos_score
from stages.rl.weights import WeightsPublisher, export_policy
from stages.scoring.reward import RewardScorer


@dataclass(frozen=True)
class PolicyInputs:
    """Artifacts the stage starts from."""

    data: Path
    sft: Path
    reward: Path


def train_policy(
    inputs: PolicyInputs,
    config: RlConfig,
    generation: GenerationConfig,
    workdir: Path,
    save_to: tuple[Path, Path],
    log_metrics: Callable[[dict[str, float], int], None],
) -> Progress:
    """Train the SFT model against the reward model.

    Args:
        inputs: prompts, SFT model, reward model.
        config: section `rl`.
        generation: section `generation`.
        workdir: checkpoints, published weights, the generator's log.
        save_to: directories of the best and of the last policy.
        log_metrics: called once per update.

    Raises:
        SettingError: a setting that only the reward model's score range can show to be wrong.
        GeneratorError, NonFiniteLossError, RunError: the run cannot go on; its last checkpoint is kept.
    """
    with _start_parts(inputs, config, generation, workdir) as parts:
        loop = Loop(parts, config, generation, workdir, log_metrics)
        loop.run()
        best, last = save_to
        export_policy(loop.best_directory, best)
        export_policy(parts.publisher.current, last)
    return loop.progress


@contextmanager
def _start_parts(
    inputs: PolicyInputs, config: RlConfig, generation: GenerationConfig, workdir: Path
) -> Iterator[Parts]:
    tokenizer = load_tokenizer(inputs.sft)
    train, _ = make_requests(read_prompts(inputs.data, "train"), tokenizer, generation, config.seed)
    validation, _ = make_requests(
        read_prompts(inputs.data, "validation"), tokenizer, generation, derive_seed(config.seed, "validation")
    )
    if not train or not validation:
        limit = generation.max_prompt_tokens
        raise InputError(f"{inputs.data}: no prompt fits into generation.max_prompt_tokens={limit}")
    scorer = RewardScorer(inputs.reward, config.learner.dtype, config.learner.micro_batch_tokens)
    missing_eos_score = resolve_missing_eos_score(config.missing_eos_score, scorer.sft_range)
    model = load_policy(inputs.sft, torch.float32)
    require_plain_head(model)
    select_trainable(model, config.learner.trainable_layers, "rl.learner.trainable_layers")
    learner = Learner(model, config.learner, config.num_updates, rescue_dir=workdir)
    # Same weights, same types, same code path as the learner: KL is exactly 0 before the first update.
    reference_model = move(load_policy(inputs.sft, torch.float32), select_device())
    freeze(reference_model)
    settings = config.algorithm.model_dump(exclude={"name"})
    algorithm = ALGORITHMS[config.algorithm.name](**settings)
    if algorithm.needs_value_model:
        raise SettingError(f"rl.algorithm.name={config.algorithm.name!r} needs a value model, which the loop has not")
    with start_generator(inputs.sft, generation, seed=config.seed, log_path=workdir / "generator.log") as generator:
        yield Parts(
            generator=generator,
            scorer=scorer,
            missing_eos_score=missing_eos_score,
            learner=learner,
            reference=Reference(reference_model, config.learner.dtype, generation.temperature),
            publisher=WeightsPublisher(inputs.sft, workdir / "weights"),
            algorithm=algorithm,
            train_prompts=train,
            validation_prompts=validation[: config.num_eval_prompts],
        )
