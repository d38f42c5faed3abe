"""Bytes of one model on one rank: under training by ZeRO stage, frozen, or generating.

A model under training is looked at in three moments of an update, of which the fullest counts: when a micro-batch's
forward pass ends, when its gradients are reduced, and in the optimizer's step. Numbers of bytes are those of float32
weights, moments and master weights, whatever the compute type. P parameters, T trained ones, n ranks.

Source: Rajbhandari et al. 2019, arXiv:1910.02054, section 5 (what each stage divides by n). Departures, all as
DeepSpeed 0.19 does it and as resident memory shows: the paper's fp16 weights and gradients are float32 here; stages 1
to 3 keep a second copy of trained weights; gradients pass through a bucket, at stage 2 while the share is there
already; stage 3 keeps its share of the gradients, and weights that are gathered stay for a while.
"""

from dataclasses import dataclass, replace

from stages.generation.config import GenerationConfig
from stages.learner.config import LearnerConfig
from stages.learner.engine import BUCKET, WHOLE_BELOW
from stages.plan.activations import count_block, count_ends, count_forward
from stages.plan.architecture import Architecture
from stages.plan.shapes import FLOAT32, SIZES, Batch, DType, ModelBytes, Trained
from stages.rl.config import RlConfig

MOMENTS = 2
"""Numbers AdamW keeps for each trained parameter."""
BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's `reduce_bucket_size` at stages 1 and 2: gradients pass through a buffer of so many numbers."""
LIVE_ELEMENTS = 1_000_000_000
"""DeepSpeed's `stage3_max_live_parameters`: gathered weights that a rank has at once."""
GATHERED_ELEMENTS = 50_000_000
"""DeepSpeed's `stage3_prefetch_bucket_size`: weights that are gathered by one call, which gloo holds twice."""


@dataclass(frozen=True)
class _Moment:
    """What is there besides weights and optimizer, in bytes."""

    gradients: float
    rest: float

    @property
    def total(self) -> float:
        return self.gradients + self.rest


def count_trained_model(trained: Trained, batch: Batch, config: LearnerConfig, *, is_gpu: bool) -> ModelBytes:
    """A model under training, on one of `config.num_ranks` ranks.

    Args:
        trained: the model, and how much of it is trained.
        batch: a rank's largest micro-batch.
        config: compute type, ranks, ZeRO stage, offloading, gradient checkpointing.
        is_gpu: there attention keeps no matrix of S x S, DeepSpeed's bucket is allocated in full, and what is offloaded
            is elsewhere.

    Raises:
        SettingError: the model has fewer layers than are to be trained.
    """
    weights, optimizer = count_weights(trained, config), count_optimizer(trained, config)
    moments = [
        _find_forward(trained, batch, config, is_gpu=is_gpu),
        _find_reduction(trained, batch, config, is_gpu=is_gpu),
    ]
    if not is_gpu or config.offload_optimizer == "none":  # else the step is made in main memory
        moments.append(_find_step(trained, config, is_gpu=is_gpu))
    fullest = max(moments, key=lambda item: item.total)
    parts = ModelBytes(weights, optimizer, fullest.gradients, fullest.rest)
    return _offload(parts, trained, config) if is_gpu else parts


def count_weights(trained: Trained, config: LearnerConfig) -> float:
    """4P; at stage 3 a rank's share, and whole those too small to be worth sharing."""
    if config.stage < 3:
        return FLOAT32 * trained.num_parameters
    whole = _count_whole(trained) if config.num_ranks > 1 else 0
    return FLOAT32 * (trained.num_parameters / config.num_ranks + whole)


def count_optimizer(trained: Trained, config: LearnerConfig) -> float:
    """What DeepSpeed's optimizer holds from update to update.

    AdamW's moments, 8T; at stages 1 to 3 a rank's share of them and of the second copy of trained weights, 12T/n; at
    stage 3 its share of the gradients and their bucket besides.
    """
    if config.stage == 0:
        return FLOAT32 * MOMENTS * trained.num_trained
    share = FLOAT32 * trained.num_trained / config.num_ranks
    if config.stage < 3:
        return (MOMENTS + 1) * share
    return (MOMENTS + 2) * share + FLOAT32 * min(BUCKET, trained.num_trained)


def count_gradients(trained: Trained, config: LearnerConfig) -> float:
    """Complete gradients as they wait for the next micro-batch or the step: 4T, at stage 2 a rank's share, 4T/n.

    At stage 3 they are the optimizer's.
    """
    if config.stage == 3:
        return 0.0
    shares = config.num_ranks if config.stage == 2 else 1
    return FLOAT32 * trained.num_trained / shares


def count_gathered(trained: Trained, config: LearnerConfig) -> float:
    """Shared-out weights that are whole on a rank while an update computes with them: 4P, of large models a part."""
    if config.stage < 3 or config.num_ranks == 1:
        return 0.0
    return float(FLOAT32 * min(trained.num_parameters - _count_whole(trained), LIVE_ELEMENTS))


def count_frozen_model(
    architecture: Architecture, batch: Batch, weights: DType, dtype: DType, *, is_gpu: bool
) -> ModelBytes:
    """A model that only scores or gives log-probabilities: of its activations one block's live at a time."""
    total = architecture.num_reward_parameters if batch.is_scoring else architecture.num_parameters
    block = batch.tokens * count_block(architecture, batch, dtype, is_gpu=is_gpu)
    return ModelBytes(weights=SIZES[weights] * total, activations=block + count_ends(architecture, batch, dtype))


def count_frozen_policy(architecture: Architecture, batch: Batch, dtype: DType, *, is_gpu: bool) -> ModelBytes:
    """A policy as `load_frozen` loads it: linear layers in the compute type, the rest in float32.

    A tied head is cast beside its float32 table, on CPU for good.
    """
    counted = count_frozen_model(architecture, batch, "fp32", dtype, is_gpu=is_gpu)
    is_cast = dtype == "bf16" and architecture.config.tie_word_embeddings
    cast = SIZES[dtype] * architecture.head_parameters if is_cast else 0
    return replace(counted, weights=counted.weights - (FLOAT32 - SIZES[dtype]) * architecture.num_linear + cast)


def count_generator(architecture: Architecture, config: GenerationConfig, shards: int) -> ModelBytes:
    """One GPU's share of a server: weights, and a cache for `max_num_seqs` completions of full length.

    Args:
        architecture: the policy's shape.
        config: section `generation`.
        shards: GPUs that a server's weights are cut over.
    """
    size = SIZES[config.dtype]
    tokens = config.max_num_seqs * (config.max_prompt_tokens + config.max_new_tokens)
    per_token = 2 * size * architecture.num_layers * architecture.num_key_value_heads * architecture.head_size
    return ModelBytes(
        weights=size * architecture.num_parameters / shards,
        cache=tokens * per_token / min(shards, architecture.num_key_value_heads),
    )


def count_published(config: RlConfig, policy: Architecture) -> float:
    """All versions that may be published at once: the trained weights in bf16, with adapters at most all."""
    learner = config.learner
    trained = Trained(policy, learner.trainable_layers, "rl.learner.trainable_layers", False, learner.lora)
    num = trained.num_trained if learner.lora is None else policy.num_parameters
    return float(SIZES["bf16"] * num * config.num_published)


def _find_forward(trained: Trained, batch: Batch, config: LearnerConfig, *, is_gpu: bool) -> _Moment:
    """The end of the forward pass. Gradients of earlier micro-batches are there, on a GPU the bucket too."""
    rest = count_forward(trained, batch, config, is_gpu=is_gpu)
    if gathered := count_gathered(trained, config):
        rest = gathered + max(rest, min(gathered, FLOAT32 * GATHERED_ELEMENTS))
    if is_gpu and config.stage in (1, 2):
        rest += FLOAT32 * BUCKET_ELEMENTS
    return _Moment(count_gradients(trained, config) if batch.num_micro_batches > 1 else 0.0, rest)


def _find_reduction(trained: Trained, batch: Batch, config: LearnerConfig, *, is_gpu: bool) -> _Moment:
    """The end of the backward pass, when activations are gone and the gradients in the bucket are reduced.

    At stage 1 the whole gradients are in it themselves; at stage 2 they are copied from it to the rank's new share,
    which is then added to that of earlier micro-batches. Gloo takes as much as a share for the reduction.
    """
    held = count_gradients(trained, config)
    share = FLOAT32 * trained.num_trained / config.num_ranks
    if config.stage == 0:
        return _Moment(held, 0.0)
    if config.stage == 1:
        return _Moment(held, share)
    if config.stage == 3:
        return _Moment(held, count_gathered(trained, config))
    bucket = FLOAT32 * (BUCKET_ELEMENTS if is_gpu else min(BUCKET_ELEMENTS, trained.num_trained))
    reduction = share if config.num_ranks > 1 and not is_gpu else 0.0
    return _Moment(held, bucket + reduction + (share if batch.num_micro_batches > 1 else 0.0))


def _find_step(trained: Trained, config: LearnerConfig, *, is_gpu: bool) -> _Moment:
    """The optimizer's step: a flat copy of the gradients and, on a GPU, roots of the second moments.

    Without sharing, several ranks have a flat copy, and on a CPU one rank has neither: clipping and the fused step
    write in place.
    """
    held = count_gradients(trained, config)
    if config.stage == 0:
        return _Moment(held, held if is_gpu or config.num_ranks > 1 else 0.0)
    share = FLOAT32 * trained.num_trained / config.num_ranks
    return _Moment(min(held, share), share * (2 if is_gpu else 1))


def _count_whole(trained: Trained) -> int:
    """Numbers that stage 3 leaves whole on every rank: small weights, and adapters."""
    return trained.architecture.count_below(WHOLE_BELOW) + trained.num_adapters


def _offload(parts: ModelBytes, trained: Trained, config: LearnerConfig) -> ModelBytes:
    """The same with optimizer and its gradients, or a rank's share of the weights, in main memory."""
    weights, optimizer, gradients, host = parts.weights, parts.optimizer, parts.gradients, 0.0
    if config.offload_optimizer == "cpu":
        host += optimizer + gradients
        optimizer = gradients = 0.0
    if config.offload_parameters == "cpu":
        share = FLOAT32 * trained.num_parameters / config.num_ranks
        host, weights = host + share, weights - share
    return ModelBytes(weights, optimizer, gradients, parts.activations, host=host)
