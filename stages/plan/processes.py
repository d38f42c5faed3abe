"""Which process of which stage holds which models where, and whether that fits.

Processes of one stage run at once unless their phases differ. On CPU all share one memory; on GPUs each takes from the
device that it runs on: each rank of the learner one of its own, a server its first n (n: `--tensor-parallel-size`).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from stages.common.errors import SettingError
from stages.common.guard import parse_cores
from stages.generation.engine_args import with_dashes
from stages.learner.config import EpochsConfig, LearnerConfig
from stages.learner.trainable import shares_prompts
from stages.plan.architecture import Architecture
from stages.plan.batches import UpdatePlan
from stages.plan.devices import GIB, Devices
from stages.plan.memory import (
    count_frozen_model,
    count_frozen_policy,
    count_generator,
    count_published,
    count_trained_model,
)
from stages.plan.settings import Settings
from stages.plan.shapes import Batch, ModelBytes, Trained, make_batch, make_shared_batch
from stages.rl.algorithm_config import PpoConfig
from stages.rl.placement import place
from stages.rl.train import make_algorithm

PROCESS_BYTES = 0.64e9
"""Python with its libraries, measured on CPU (docs/benchmarks/2026-11-21-memory.json: `before_bytes`). On a GPU the
same is assumed for the CUDA context."""
RUNNING_BYTES = 0.11e9
"""What libraries take once a learner computes, beside every tensor: measured on CPU, between updates
(docs/benchmarks/2026-11-21-memory.md)."""
SERVER_BYTES = 2.3e9
"""A vLLM server on CPU beside its weights and cache, in three processes; measured while a default run sampled
(docs/benchmarks/2026-11-22-default-run.json: the stage's total less learner, scoring, weights and cache)."""
DEFAULT_UTILIZATION = 0.92
"""vLLM's `--gpu-memory-utilization`: the share of a GPU that a server takes, whatever it needs."""
GOLD_BATCH_TOKENS = 4096
"""Padded tokens that a gold model reads at once."""


@dataclass(frozen=True)
class Models:
    """The shapes there are."""

    policy: Architecture
    """Of the reward model too, which starts from the SFT model."""
    gold: Architecture | None
    """Of the task's gold reward model; None: it has none, or it is not here."""


@dataclass(frozen=True)
class Process:
    """What one process needs, in bytes."""

    stage: str
    name: str
    device: str
    """Whose memory it takes."""
    parts: ModelBytes
    needs: float
    """Above this it fails, or is refused."""
    phase: int = 0
    """Processes of one stage and phase run at once."""
    full_sequences: int | None = None
    """Of a generator: sequences of full length whose keys and values it holds."""


@dataclass(frozen=True)
class Load:
    """All that runs at once on one device."""

    stage: str
    phase: int
    device: str
    needs: float


def list_processes(settings: Settings, models: Models, update: UpdatePlan, devices: Devices) -> list[Process]:
    """Every process that holds a model, in the order of the stages.

    Raises:
        SettingError: layers, devices or arguments that do not go together.
    """
    return [
        *_train_epochs("train_sft", settings.sft, models.policy, devices, rows=1),
        *_label_pairs(settings, models, devices),
        *_train_reward(settings, models, devices),
        *_train_policy(settings, models, update, devices),
        *_sample_policy(settings, models, devices),
        *_judge_policy(settings, models, devices),
    ]


def sum_loads(processes: Iterable[Process]) -> list[Load]:
    """What each device must hold at once, in the order of the stages."""
    sums: dict[tuple[str, int, str], float] = {}
    for item in processes:
        key = (item.stage, item.phase, item.device)
        sums[key] = sums.get(key, 0) + item.needs
    return [Load(*key, needs) for key, needs in sums.items()]


def find_utilization(arguments: Sequence[str]) -> float:
    """The share of a GPU that `generation.engine_args` gives a server.

    Raises:
        SettingError: it is no share.
    """
    value = _find_argument(arguments, "--gpu-memory-utilization", str(DEFAULT_UTILIZATION))
    try:
        share = float(value)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise SettingError(f"generation.engine_args: --gpu-memory-utilization={value}: allowed: above 0, at most 1")
    return share


def count_shards(arguments: Sequence[str]) -> int:
    """GPUs that `generation.engine_args` cuts a server's weights over.

    Raises:
        SettingError: it is no positive number.
    """
    value = _find_argument(arguments, "--tensor-parallel-size", _find_argument(arguments, "-tp", "1"))
    if not value.isdecimal() or int(value) == 0:
        raise SettingError(f"generation.engine_args: --tensor-parallel-size={value}: allowed: a positive number")
    return int(value)


def _train_epochs(
    stage: str, config: EpochsConfig, policy: Architecture, devices: Devices, *, rows: int
) -> Iterator[Process]:
    """SFT trains single sequences, the reward model pairs."""
    is_reward = rows == 2
    completion, learner = 0 if is_reward else config.max_tokens, config.learner
    batch = make_batch(
        learner.micro_batch_tokens, rows, config.max_tokens, completion, config.batch_size, learner.num_ranks
    )
    parts = _count_learner(policy, learner, batch, "reward" if is_reward else "sft", devices)
    yield from _list_ranks(stage, "learner", _find_places(learner, devices.numbers, devices), [parts])


def _train_reward(settings: Settings, models: Models, devices: Devices) -> Iterator[Process]:
    """Nothing is trained where a rule scores."""
    if not settings.has_rule:
        yield from _train_epochs("train_reward", settings.reward, models.policy, devices, rows=2)


def _label_pairs(settings: Settings, models: Models, devices: Devices) -> Iterator[Process]:
    yield from _list_servers("label_pairs", settings, models.policy, [devices.numbers], devices)
    if models.gold is not None:
        gold = _count_gold(settings, models.gold, devices)
        yield _make_process("label_pairs", "gold model", devices.name(devices.numbers[0]), [gold])


def _train_policy(settings: Settings, models: Models, update: UpdatePlan, devices: Devices) -> Iterator[Process]:
    config = settings.rl
    placement = place(config, devices.numbers)
    numbers = sorted(parse_cores(placement.learner))
    held = list(_list_learner(settings, models, update, devices))
    # The reward model is rank 0's alone.
    extra = [*_list_scorer(settings, models, update, devices), *_list_published(settings, models)]
    places = _find_places(config.learner, numbers, devices)
    yield from _list_ranks("train_policy", _name_learner(settings), places, held, of_first=extra)
    if not config.is_live:
        return
    groups = [tuple(sorted(parse_cores(item))) for item in placement.generators]
    yield from _list_servers("train_policy", settings, models.policy, groups, devices)
    beside = list(_list_beside(settings, models, devices))
    if beside:
        first = groups[0][0] if groups else numbers[0]  # without servers here it is beside the learner
        yield _make_process("train_policy", "scoring", devices.name(first), beside)


def _list_learner(settings: Settings, models: Models, update: UpdatePlan, devices: Devices) -> Iterator[ModelBytes]:
    """What every rank holds: the policy, the reference (with adapters it is the policy without them), PPO's value."""
    config = settings.rl
    batch = _make_rl_batch(settings, models.policy, update)
    yield _count_learner(models.policy, config.learner, batch, "rl", devices)
    if config.learner.lora is None:
        # Shared out it is in float32, and whole before that.
        if config.learner.stage < 3:
            yield count_frozen_policy(models.policy, batch, config.learner.dtype, is_gpu=devices.is_gpu)
        else:
            yield count_frozen_model(models.policy, batch, "fp32", config.learner.dtype, is_gpu=devices.is_gpu)
    if isinstance(config.algorithm, PpoConfig):
        yield _count_learner(models.policy, config.learner, replace(batch, completion_tokens=0), "rl", devices)


def _list_scorer(settings: Settings, models: Models, update: UpdatePlan, devices: Devices) -> Iterator[ModelBytes]:
    """The reward model, where it is in the learner's process."""
    config = settings.rl
    if _has_scorer(settings):
        scores = replace(_make_rl_batch(settings, models.policy, update), completion_tokens=0)
        yield count_frozen_model(
            models.policy, scores, config.learner.dtype, config.learner.dtype, is_gpu=devices.is_gpu
        )


def _list_published(settings: Settings, models: Models) -> Iterator[ModelBytes]:
    """Versions that wait on the learner's GPU for the servers, where they travel without a file."""
    config = settings.rl
    if config.is_live and config.publish != "files":
        yield ModelBytes(weights=count_published(config, models.policy))


def _has_scorer(settings: Settings) -> bool:
    config = settings.rl
    return config.is_live and config.score_on == "learner" and not settings.has_rule


def _find_places(learner: LearnerConfig, numbers: Sequence[int], devices: Devices) -> list[str]:
    """Whose memory each rank of this machine takes; with more ranks than GPUs the others are on other machines."""
    if devices.is_gpu:
        return [devices.name(number) for number in numbers[: learner.num_ranks]]
    return [devices.name(numbers[0])] * learner.num_ranks


def _list_ranks(
    stage: str, name: str, places: Sequence[str], models: Sequence[ModelBytes], of_first: Sequence[ModelBytes] = ()
) -> Iterator[Process]:
    """A process for each rank.

    Args:
        stage: whose learner.
        name: of its process.
        places: devices of the ranks.
        models: that every rank holds a share of.
        of_first: models that rank 0 holds besides.
    """
    for rank, place_ in enumerate(places):
        held = [*models, *of_first] if rank == 0 else models
        suffix = f", rank {rank}" if len(places) > 1 else ""
        yield _make_process(stage, name + suffix, place_, held, running=RUNNING_BYTES)


def _list_beside(settings: Settings, models: Models, devices: Devices) -> Iterator[ModelBytes]:
    """What the process on the generator's devices holds."""
    config = settings.rl
    tokens, longest = config.learner.micro_batch_tokens, settings.longest
    if config.score_on == "generator" and not settings.has_rule:
        scores = Batch(max(tokens, longest), longest, 0)
        yield count_frozen_model(
            models.policy, scores, config.learner.dtype, config.learner.dtype, is_gpu=devices.is_gpu
        )
    algorithm = make_algorithm(config, settings.generation)
    if config.reference_on == "generator" and algorithm.needs_reference:
        batch = make_batch(tokens, 1, longest, settings.generation.max_new_tokens, config.prompts_per_update)
        yield count_frozen_policy(models.policy, batch, config.learner.dtype, is_gpu=devices.is_gpu)


def _sample_policy(settings: Settings, models: Models, devices: Devices) -> Iterator[Process]:
    yield from _list_servers("sample_policy", settings, models.policy, [devices.numbers], devices)
    tokens, longest = settings.judge.micro_batch_tokens, settings.longest
    size = max(tokens, longest)
    batch = Batch(size, longest, size * settings.generation.max_new_tokens // longest)
    parts = count_frozen_policy(models.policy, batch, settings.judge.dtype, is_gpu=devices.is_gpu)
    yield _make_process("sample_policy", "measuring", devices.name(devices.numbers[0]), [parts], phase=1)


def _judge_policy(settings: Settings, models: Models, devices: Devices) -> Iterator[Process]:
    held = [] if models.gold is None else [_count_gold(settings, models.gold, devices)]
    if not settings.has_rule:
        scores = Batch(max(settings.judge.micro_batch_tokens, settings.longest), settings.longest, 0)
        held.append(
            count_frozen_model(models.policy, scores, settings.judge.dtype, settings.judge.dtype, is_gpu=devices.is_gpu)
        )
    if held:
        yield _make_process("judge_policy", "scoring", devices.name(devices.numbers[0]), held)


def _list_servers(
    stage: str, settings: Settings, policy: Architecture, groups: Sequence[tuple[int, ...]], devices: Devices
) -> Iterator[Process]:
    """Servers, each on a group of devices; on GPUs it takes its share whatever it needs."""
    config = settings.generation
    shards = count_shards(config.engine_args) if devices.is_gpu else 1
    parts = count_generator(policy, config, shards)
    for number, group in enumerate(groups):
        name = f"generator {number}" if len(groups) > 1 else "generator"
        if len(group) < shards:
            raise SettingError(
                f"generation.engine_args: --tensor-parallel-size={shards}, but {name} of {stage} has {len(group)} GPUs"
            )
        if config.engine == "transformers":
            yield _make_process(stage, f"{name}, in process", devices.name(group[0]), [parts])
            continue
        held = _hold_cache(settings, parts, devices)
        needs = held.total if devices.is_gpu else held.total + SERVER_BYTES
        sequences = int(held.cache * config.max_num_seqs // parts.cache)
        for device in group[:shards]:
            yield Process(stage, name, devices.name(device), held, needs, full_sequences=sequences)


def _hold_cache(settings: Settings, wanted: ModelBytes, devices: Devices) -> ModelBytes:
    """A server's weights with the cache that it makes: what its share of a GPU leaves, or as set for a CPU.

    Without room for one sequence it would not start, so that is the least.
    """
    config = settings.generation
    if not devices.is_gpu:
        return ModelBytes(weights=wanted.weights, cache=config.kv_cache_gib * GIB)
    room = find_utilization(config.engine_args) * devices.memory_bytes - wanted.weights
    return ModelBytes(weights=wanted.weights, cache=max(room, wanted.cache / config.max_num_seqs))


def _make_rl_batch(settings: Settings, policy: Architecture, update: UpdatePlan) -> Batch:
    config = settings.rl
    if config.is_offline:
        longest = completion = settings.reward.max_tokens
    else:
        longest, completion = settings.longest, settings.generation.max_new_tokens
    learner = config.learner
    has_shared = not config.is_offline and update.num_trained > update.num_prompts
    if has_shared and shares_prompts(learner, policy.model):
        prompts = (update.num_prompts, update.num_units // update.num_prompts)
        tokens, prompt_tokens = learner.micro_batch_tokens, longest - completion
        return make_shared_batch(tokens, update.rows_per_unit, prompt_tokens, completion, prompts, learner.num_ranks)
    return make_batch(
        learner.micro_batch_tokens, update.rows_per_unit, longest, completion, update.num_units, learner.num_ranks
    )


def _count_learner(
    policy: Architecture, learner: LearnerConfig, batch: Batch, section: str, devices: Devices
) -> ModelBytes:
    setting = f"{section}.learner.trainable_layers"
    trained = Trained(policy, learner.trainable_layers, setting, batch.is_scoring, learner.lora)
    return count_trained_model(trained, batch, learner, is_gpu=devices.is_gpu)


def _count_gold(settings: Settings, gold: Architecture, devices: Devices) -> ModelBytes:
    batch = Batch(max(GOLD_BATCH_TOKENS, settings.longest), settings.longest, 0)
    return count_frozen_model(gold, batch, "bf16", "bf16", is_gpu=devices.is_gpu)


def _name_learner(settings: Settings) -> str:
    config = settings.rl
    held = ["policy"] if config.learner.lora else ["policy", "reference"]
    if isinstance(config.algorithm, PpoConfig):
        held.append("value")
    if _has_scorer(settings):
        held.append("reward")
    return " + ".join(held)


def _make_process(
    stage: str, name: str, device: str, models: Sequence[ModelBytes], phase: int = 0, running: float = 0
) -> Process:
    """Models of one process compute one after the other, so only the largest gradients and activations count."""
    busiest = max(models, key=lambda item: item.gradients + item.activations)
    parts = ModelBytes(
        weights=sum(item.weights for item in models),
        optimizer=sum(item.optimizer for item in models),
        gradients=busiest.gradients,
        activations=busiest.activations,
        cache=sum(item.cache for item in models),
        host=sum(item.host for item in models),
    )
    return Process(stage, name, device, parts, parts.total + PROCESS_BYTES + running, phase)


def _find_argument(arguments: Sequence[str], name: str, default: str) -> str:
    """The value of the last `NAME=VALUE` or `NAME VALUE`."""
    value = default
    for place_, argument in enumerate(map(with_dashes, arguments)):
        if argument.startswith(f"{name}="):
            value = argument.partition("=")[2]
        elif argument == name and place_ + 1 < len(arguments):
            value = arguments[place_ + 1]
    return value
