"""Puts the RL loop's parts together, resumes what an earlier attempt left, and publishes the results."""

import functools
import logging
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from stages.common.errors import InputError
from stages.common.guard import parse_cores
from stages.common.hashing import hash_paths, hash_text
from stages.common.watched import warn_unless_watched
from stages.data.seeds import derive_seed
from stages.data.store import read_prompts
from stages.generation.config import GenerationConfig, require_room
from stages.generation.devices import name_visible_gpus
from stages.generation.engine_args import check_engine_args
from stages.generation.protocol import Generator, Request, SamplingPlan
from stages.generation.requests import make_requests, spread
from stages.generation.start import GeneratorSettings, start_generator
from stages.learner.checkpoint import find_checkpoint
from stages.learner.config import LearnerConfig
from stages.learner.engine import Learner
from stages.learner.launch import open_ranks
from stages.learner.layout import settle_stage
from stages.learner.ranks import Ranks
from stages.learner.trainable import count_shared_blocks, load_trained_policy, load_trained_reward, shares_prompts
from stages.models.load import list_devices, load_tokenizer
from stages.rl.algorithm_config import DpoConfig, PpoConfig, check_greedy_max_tokens
from stages.rl.algorithms import ALGORITHMS
from stages.rl.algorithms.protocol import Algorithm
from stages.rl.config import RlConfig
from stages.rl.inbox import Inbox, StartScoring
from stages.rl.kept import KeptCheckpoints
from stages.rl.ledger.compaction import publish_ledger
from stages.rl.ledger.reader import read_groups
from stages.rl.ledger.schema import Event, LedgerHeader
from stages.rl.ledger.writer import Ledger
from stages.rl.loop import Loop, LoopParts
from stages.rl.mini_batch import Preparation
from stages.rl.placement import Placement, check_launched, check_publish, count_gpus, pin_this_process, place
from stages.rl.progress import Progress
from stages.rl.prompts import PromptStream
from stages.rl.reference import ReferenceSource, reads_reference
from stages.rl.replay import open_recording, replay
from stages.rl.rollouts import Reference
from stages.rl.sampling import Sampling, SamplingParts
from stages.rl.scorer import resolve_missing_eos_score
from stages.rl.scoring import ProcessSettings, ScoringJob, ScoringProcess
from stages.rl.staleness import Admission
from stages.rl.stopping import StopSignals
from stages.rl.timeline import LEARNER, Timeline
from stages.rl.training import LogMetrics, Training
from stages.rl.value import ValueModel
from stages.rl.weights import ProbeText, Publisher, copy_policy, link_policy, make_publisher, open_scratch
from stages.scoring.load import holds_reward_model, load_scorer, read_score_range

logger = logging.getLogger(__name__)

SETTING = "rl.learner"
LEDGER = "ledger"
TIMELINE = "timeline.jsonl"
WATCHED = Path("inputs/ledger")
"""Ledgers to replay are put here; dvc.yaml names it as a dependency."""


@dataclass(frozen=True)
class PolicyInputs:
    """Artifacts the stage starts from."""

    data: Path
    sft: Path
    reward: Path


@dataclass(frozen=True)
class PolicyOutputs:
    """Directories that are filled when the run is complete."""

    best: Path
    last: Path
    ledger: Path
    checkpoints: Path


@dataclass(frozen=True)
class Result:
    """What there is to report."""

    progress: Progress
    timeline: Timeline
    dropped: dict[str, int]
    publish_bytes: int
    num_prompts_too_long: int


def train_policy(
    inputs: PolicyInputs,
    config: RlConfig,
    generation: GenerationConfig,
    workdir: Path,
    save_to: PolicyOutputs,
    log_metrics: LogMetrics,
) -> Result:
    """Train the SFT model against the reward model, from a generator or from a recorded ledger.

    Args:
        inputs: prompts, SFT model, reward model.
        config: section `rl`.
        generation: section `generation`.
        workdir: checkpoints, ledger, the generators' logs.
        save_to: directories of the best, the last and the kept policies and of the ledger.
        log_metrics: called once per update.

    Raises:
        SettingError: settings that do not go together with this machine or this reward model.
        InputError: data that cannot be used, or a ledger of other settings.
        GeneratorError, NonFiniteLossError, RunError: the run cannot go on; its last checkpoint is kept.
    """
    placement = _place(config, generation)
    prompts = _read_prompts(inputs, config, generation)
    lowest = resolve_missing_eos_score(config.missing_eos_score, read_score_range(inputs.reward))
    algorithm = make_algorithm(config, generation)
    setting = _Setting(inputs, config, generation, algorithm, placement, prompts, lowest, workdir)
    timeline = Timeline(workdir / TIMELINE)
    if config.replay_from is not None:
        return _replay(setting, Path(config.replay_from), timeline, log_metrics, save_to)
    with ExitStack() as stack:
        scratch = stack.enter_context(_open_scratch(setting))
        stop = stack.enter_context(StopSignals())
        generator = stack.enter_context(_start_generator(setting, timeline, scratch))
        ranks = stack.enter_context(_open_ranks(setting))
        training = _make_training(setting, timeline, log_metrics, ranks)
        kind = "score" if config.score_on == "generator" else "reference"
        inbox = Inbox(generator, _scoring_starter(setting, training.preparation), timeline.add, kind)
        stack.callback(inbox.close)
        ledger = Ledger.open(workdir / LEDGER, make_header(setting))
        stack.callback(ledger.flush)  # what explains an error that ends the run
        publisher = _make_publisher(setting, scratch, ranks, training.preparation.learner.trunk_depth)
        parts = _make_loop_parts(setting, generator, inbox, ledger, stop, publisher)
        progress = _resume(training, parts)
        Loop(training, parts, config, progress).run()
        progress.num_samples = parts.sampling.num_samples
        ledger.flush()
        _save(training, progress, ledger.path, save_to)
    dropped = dict(parts.sampling.dropped)
    return Result(progress, timeline, dropped, parts.publisher.num_bytes, prompts.num_too_long)


def _replay(
    setting: "_Setting", ledger: Path, timeline: Timeline, log_metrics: LogMetrics, save_to: PolicyOutputs
) -> Result:
    warn_unless_watched(ledger, WATCHED)
    recording = open_recording(ledger, make_header(setting))
    with _open_ranks(setting) as ranks:
        training, progress = _make_training(setting, timeline, log_metrics, ranks), Progress()
        dropped = replay(recording, training, progress)
        _save(training, progress, ledger, save_to)
    return Result(progress, timeline, dropped, 0, setting.prompts.num_too_long)


def _place(config: RlConfig, generation: GenerationConfig) -> Placement:
    """Who gets which devices, once it is known that servers would start there and could be sent weights."""
    placement = place(config, list_devices(), count_gpus(generation))
    is_replayed = config.replay_from is not None
    if not is_replayed or config.learner_devices != "auto":
        check_launched(placement.learner)
    if not is_replayed:
        check_publish(config, placement)
        check_engine_args(generation.engine_args)
        if not isinstance(config.algorithm, DpoConfig):
            require_room(generation, config.algorithm.samples_per_prompt, "rl.algorithm.samples_per_prompt")
    return placement


def make_algorithm(config: RlConfig, generation: GenerationConfig) -> Algorithm:
    """The algorithm with its settings.

    Raises:
        SettingError: they do not go together with how completions are sampled.
    """
    check_greedy_max_tokens(config.algorithm, generation.max_new_tokens)
    settings = config.algorithm.model_dump(exclude={"name", "value_lr"})
    return ALGORITHMS[config.algorithm.name](**settings)


def make_header(setting: "_Setting") -> LedgerHeader:
    """What a ledger of this run is recorded under."""
    config, algorithm = setting.config, setting.algorithm
    prompts = "\n".join(f"{item.prompt_id} {item.prompt_ids}" for item in setting.prompts.train)
    return LedgerHeader(
        max_staleness=config.max_staleness,
        updates_per_rollout=config.updates_per_rollout,
        epochs_per_rollout=config.epochs_per_rollout,
        prompts_per_update=config.prompts_per_update,
        num_updates=config.num_updates,
        samples_per_prompt=algorithm.num_samples,
        with_greedy=algorithm.with_greedy,
        weight_update=config.weight_update,
        seed=config.seed,
        num_prompts=len(setting.prompts.train),
        prompts_hash=hash_text(prompts),
        model_hash=hash_paths((str(setting.inputs.sft),))[str(setting.inputs.sft)],
        temperature=setting.generation.temperature,
    )


@dataclass(frozen=True)
class _Prompts:
    train: list[Request]
    validation: list[Request]
    num_too_long: int = 0
    """Training prompts that were dropped."""


@dataclass(frozen=True)
class _Setting:
    """Everything a run is determined by."""

    inputs: PolicyInputs
    config: RlConfig
    generation: GenerationConfig
    algorithm: Algorithm
    placement: Placement
    prompts: _Prompts
    missing_eos_score: float
    workdir: Path


def _read_prompts(inputs: PolicyInputs, config: RlConfig, generation: GenerationConfig) -> _Prompts:
    tokenizer = load_tokenizer(inputs.sft)
    train, num_too_long = make_requests(read_prompts(inputs.data, "train"), tokenizer, generation, config.seed)
    validation, num_validation_too_long = make_requests(
        read_prompts(inputs.data, "validation"), tokenizer, generation, derive_seed(config.seed, "validation")
    )
    limit = f"generation.max_prompt_tokens={generation.max_prompt_tokens}"
    if not train or not validation:
        raise InputError(f"{inputs.data}: no prompt fits into {limit}")
    if num_too_long or num_validation_too_long:
        logger.warning(
            "dropped, longer than %s: %d of %d training prompts, %d of %d validation prompts",
            *(limit, num_too_long, len(train) + num_too_long),
            *(num_validation_too_long, len(validation) + num_validation_too_long),
        )
    if len(validation) < config.num_eval_prompts:
        logger.warning("evaluations have %d prompts, rl.num_eval_prompts=%d", len(validation), config.num_eval_prompts)
    return _Prompts(train, spread(validation, config.num_eval_prompts), num_too_long)


def _open_scratch(setting: _Setting) -> AbstractContextManager[Path]:
    config = setting.config
    weights = setting.inputs.sft.glob("*.safetensors") if config.publish == "files" else ()
    num_bytes = sum(path.stat().st_size for path in weights)  # in bf16, as they are published
    return open_scratch(config.generator.weights_dir, setting.workdir / "weights", num_bytes * config.num_published)


def _start_generator(setting: _Setting, timeline: Timeline, scratch: Path) -> AbstractContextManager[Generator]:
    config = setting.config
    shared_model = scratch / "first" if config.generator.urls else None
    if shared_model is not None:
        copy_policy(setting.inputs.sft, shared_model)
    settings = GeneratorSettings(
        fleet=config.generator,
        devices=setting.placement.generators,
        weight_update=config.weight_update,
        seed=config.seed,
        scratch=scratch,
        shared_model=shared_model,
        publish=config.publish,
    )
    return start_generator(
        setting.inputs.sft, setting.generation, log_dir=setting.workdir, settings=settings, record=timeline.add
    )


def _open_ranks(setting: _Setting) -> AbstractContextManager[Ranks]:
    """Those that train; they share the learner's devices."""
    pin_this_process(setting.placement.learner)  # servers that are started later say themselves where they run
    devices = sorted(parse_cores(setting.placement.learner))
    return open_ranks(setting.config.learner, SETTING, setting.workdir, devices)


def _make_training(setting: _Setting, timeline: Timeline, log_metrics: LogMetrics, ranks: Ranks) -> Training:
    inputs, config, algorithm = setting.inputs, setting.config, setting.algorithm
    make_model = functools.partial(load_trained_policy, inputs.sft, config.learner, SETTING)
    settings = settle_stage(config.learner, setting.workdir)
    learner = ranks.make_learner(make_model, settings, config.num_updates, setting.workdir)
    value_learner = _make_value_learner(setting, settings, ranks)
    trained = [item.model for item in (learner, value_learner) if item]
    trunk_depth = count_shared_blocks(config.learner, *trained)
    logger.info("computed once for all models blocks=%d", trunk_depth)
    policy = Reference(learner.model, config.learner.dtype, setting.generation.temperature, trunk_depth=trunk_depth)
    references = ReferenceSource(ranks, inputs.sft, policy, config.learner)
    is_replayed = config.replay_from is not None
    are_recorded = is_replayed or config.reference_on == "generator"
    dtype, max_tokens = config.learner.dtype, config.learner.micro_batch_tokens
    is_local = config.score_on == "learner" and not is_replayed
    preparation = Preparation(
        algorithm=algorithm,
        scorer=load_scorer(inputs.reward, dtype, max_tokens) if is_local else None,
        missing_eos_score=setting.missing_eos_score,
        reference=references.load() if reads_reference(algorithm, are_recorded=are_recorded) else None,
        learner=policy,
        max_tokens=max_tokens,
        value=None if value_learner is None else ValueModel(value_learner.model, dtype),
        ranks=ranks,
        share_prompts=shares_prompts(config.learner, *trained),
    )
    return Training(
        learner=learner,
        preparation=preparation,
        references=references,
        timeline=timeline,
        template=inputs.sft,
        workdir=setting.workdir,
        max_kl_nats=config.max_kl_nats,
        log_metrics=log_metrics,
        kept=KeptCheckpoints(setting.workdir, config.keep_checkpoints),
        value_learner=value_learner,
    )


def _make_value_learner(setting: _Setting, settings: LearnerConfig, ranks: Ranks) -> Learner | None:
    """A second learner for algorithms that learn values: from the reward model, or from SFT where none was trained."""
    algorithm, config, inputs = setting.config.algorithm, setting.config, setting.inputs
    if not isinstance(algorithm, PpoConfig):
        return None
    path, head_seed = (inputs.reward, None) if holds_reward_model(inputs.reward) else (inputs.sft, config.seed)
    make_model = functools.partial(load_trained_reward, path, config.learner, SETTING, head_seed)
    settings = settings.model_copy(update={"lr": algorithm.value_lr or settings.lr})
    return ranks.make_learner(make_model, settings, config.num_updates, setting.workdir / "value")


def _scoring_starter(setting: _Setting, preparation: Preparation) -> StartScoring | None:
    """Starts the process that scores on the generator's devices, where the settings ask for one."""
    config, placement = setting.config, setting.placement
    with_reference = config.reference_on == "generator" and setting.algorithm.needs_reference
    if config.score_on == "learner" and not with_reference:
        return None
    job = ScoringJob(
        reward=setting.inputs.reward if config.score_on == "generator" else None,
        sft=setting.inputs.sft if with_reference else None,
        algorithm=setting.algorithm,
        dtype=config.learner.dtype,
        micro_batch_tokens=config.learner.micro_batch_tokens,
        temperature=setting.generation.temperature,
        missing_eos_score=preparation.missing_eos_score,
        share_prompts=preparation.share_prompts,
    )
    is_gpu = torch.cuda.is_available()
    settings = ProcessSettings(
        log_path=setting.workdir / "scoring.log",
        cores=None if is_gpu else placement.scoring_cores,
        num_threads=None if is_gpu else len(parse_cores(placement.scoring)),
        # LOCAL_RANK is the learner's otherwise, which counts all GPUs.
        env={"CUDA_VISIBLE_DEVICES": name_visible_gpus(placement.scoring), "LOCAL_RANK": "0"} if is_gpu else {},
        timeout_s=config.score_timeout_s,
        start_timeout_s=setting.generation.start_timeout_s,
        max_restarts=config.generator.max_restarts,
    )
    return lambda on_result, on_failure: ScoringProcess(job, settings, on_result, on_failure)


def _make_publisher(setting: _Setting, scratch: Path, ranks: Ranks, trunk_depth: int) -> Publisher:
    config = setting.config
    probe_ids = [token for request in setting.prompts.validation for token in request.prompt_ids]
    probe_ids = probe_ids[: setting.generation.max_prompt_tokens]
    probe = ProbeText(tuple(probe_ids), config.learner.dtype, config.max_logprob_gap, ranks, trunk_depth)
    return make_publisher(config.publish, scratch, probe)


def _make_loop_parts(
    setting: _Setting,
    generator: Generator,
    inbox: Inbox,
    ledger: Ledger,
    stop: StopSignals,
    publisher: Publisher,
) -> LoopParts:
    config, prompts = setting.config, setting.prompts
    sampling_parts = SamplingParts(
        generator=generator,
        inbox=inbox,
        stream=PromptStream(prompts.train, config.seed),
        plan=SamplingPlan(
            setting.algorithm.num_samples, setting.algorithm.with_greedy, setting.algorithm.greedy_max_tokens
        ),
        ledger=ledger,
        stop=stop,
        stall_timeout_s=config.stall_timeout_s,
    )
    num_places = config.num_updates // config.epochs_per_rollout * config.prompts_per_update
    admission = Admission(config.rule, num_places, in_order=config.weight_update == "drain")
    return LoopParts(
        sampling=Sampling(sampling_parts, admission),
        publisher=publisher,
        ledger=ledger,
        stop=stop,
        validation_prompts=prompts.validation,
    )


def _resume(training: Training, parts: LoopParts) -> Progress:
    """Bring everything to the newest checkpoint's state, or to the start where there is none."""
    found = find_checkpoint(training.workdir)
    if found is None:
        parts.ledger.roll_back_to(0)
        return Progress()
    path, state = found
    training.load(path)
    training.timeline.restore(state["timeline"])
    parts.ledger.roll_back_to(state["ledger_offset"])
    version = training.learner.updates
    parts.ledger.add_event(Event("resumed", update=version))
    parts.sampling.publish(parts.publisher.write(training.learner, version))
    ready = [(int(number), attempt) for number, attempt in state["sampling"]["ready"].items()]
    parts.sampling.restore(state["sampling"], read_groups(parts.ledger.path, ready), version)
    logger.info("resumed policy_version=%d finished_groups=%d", version, len(ready))
    return Progress.from_state(state["progress"])


def _save(training: Training, progress: Progress, ledger: Path, save_to: PolicyOutputs) -> None:
    link_policy(training.best_directory(progress), save_to.best)
    training.export(training.learner.updates, save_to.last)
    training.kept.publish(save_to.checkpoints)
    with training.timeline.span(LEARNER, "record", training.learner.updates):
        publish_ledger(ledger, save_to.ledger)
