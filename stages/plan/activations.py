"""Bytes of what autograd keeps for the backward pass, by what the operations of a Hugging Face model save.

Shapes: S tokens of a sequence, H hidden size, I width of the feed-forward part, h heads, D = h x head size, V
vocabulary, L blocks under training. How far the formulas are from measured bytes is in docs/recipes.md.
"""

from stages.learner.config import LearnerConfig
from stages.learner.logprobs import TABLE_ROWS, count_rows
from stages.plan.architecture import Architecture
from stages.plan.shapes import FLOAT32, SIZES, Batch, DType, Trained

_LOGITS_BYTES = 14
"""Of a chunk's logits, per number: the matrix product in bf16, and three float32 tensors of `_log_softmax`."""
_RESIDUAL_BYTES = {"bf16": 6, "fp32": 4}
"""Of a chunk's softmax in the head's backward pass, per number: float32, and its cast for the matrix product."""
_FEED_FORWARD: dict[str, tuple[int, int, int]] = {
    "silu": (8, 8, 16),  # gated: both projections, the activation and the product
    "relu": (2, 2, 4),  # its result is the next matrix's input
    "gelu": (4, 4, 8),
    "gelu_new": (10, 16, 20),  # written out in Python; on a GPU autocast takes its power, and what follows, in float32
}
"""Bytes kept per number of I and token, by activation: in bf16 on CPU, in bf16 on a GPU, in float32."""


def count_forward(trained: Trained, batch: Batch, config: LearnerConfig, *, is_gpu: bool) -> float:
    """What a forward pass of a model under training keeps, the head's backward pass included.

    L blocks' own, with the bf16 copies of their matrices. With gradient checkpointing (Chen et al. 2016,
    arXiv:1604.06174, section 3) what enters each block, in float32, and one block that is computed again.
    """
    architecture = trained.architecture
    block = batch.tokens * _count_trained_block(trained, batch, config, is_gpu=is_gpu)
    casts = count_casts(trained, config)
    if config.gradient_checkpointing:
        inputs = trained.num_layers * batch.tokens * FLOAT32 * architecture.hidden_size
        # Autocast keeps copies of trained matrices to the end of the forward pass, when no block is computed again.
        cached = casts if trained.lora is None else 0.0
        blocks = inputs + max(cached, block + casts / trained.num_layers)
    else:
        blocks = trained.num_layers * block + casts
    return blocks + count_ends(architecture, batch, config.dtype) + _count_head(trained, batch, config.dtype)


def count_block(architecture: Architecture, batch: Batch, dtype: DType, *, is_gpu: bool) -> float:
    """Bytes a token that autograd keeps in one transformer block, all of whose weights are trained.

    The residual stream is float32 under autocast, and norms keep it so. Matrices keep their input in the compute type:
    a cast for each matrix in bf16, one tensor for all in float32. Keys and values are kept repeated for each head.
    """
    size, hidden = SIZES[dtype], architecture.hidden_size
    width = architecture.num_heads * architecture.head_size
    norms = 2 * FLOAT32 * hidden * (2 if architecture.has_rms_norm else 1)
    attention = (2 + 2 * batch.kept_keys) * size * width  # queries and the output, keys and values
    if not is_gpu:
        # Probabilities in float32, and their cast for the product with the values.
        keys = batch.attended_tokens or batch.sequence_tokens
        attention += architecture.num_heads * keys * (FLOAT32 + (2 if dtype == "bf16" else 0))
    on_cpu, on_gpu, in_float32 = _FEED_FORWARD.get(architecture.activation, _FEED_FORWARD["gelu"])
    of_activation = in_float32 if dtype == "fp32" else on_gpu if is_gpu else on_cpu
    feed_forward = of_activation * architecture.intermediate_size
    return norms + _count_inputs(architecture, dtype) + attention + feed_forward


def count_ends(architecture: Architecture, batch: Batch, dtype: DType) -> float:
    """The last norm, the hidden states before completion tokens, and the logits of one chunk of them."""
    norm = batch.tokens * FLOAT32 * architecture.hidden_size * (2 if architecture.has_rms_norm else 1)
    if batch.is_scoring:
        return norm
    predictors = batch.completion_tokens * architecture.hidden_size * (2 * FLOAT32 + SIZES[dtype])
    return norm + predictors + _count_logits(architecture, batch) * _LOGITS_BYTES


def count_casts(trained: Trained, config: LearnerConfig) -> float:
    """bf16 copies of the matrices that the backward pass goes through: trained ones, and frozen ones under adapters.

    An embedding table is read by row, so nothing casts it. At ZeRO stage 3 DeepSpeed's own linear layer keeps the
    weight's place in its stead (`memory_efficient_linear`).
    """
    if config.dtype == "fp32" or config.stage == 3:
        return 0.0
    return float(SIZES["bf16"] * (trained.num_in_blocks + trained.num_adapters))


def _count_trained_block(trained: Trained, batch: Batch, config: LearnerConfig, *, is_gpu: bool) -> float:
    """`count_block` of a block as this learner trains it."""
    architecture = trained.architecture
    block = count_block(architecture, batch, config.dtype, is_gpu=is_gpu)
    if config.stage == 3:
        # DeepSpeed's linear layer keeps its input as it comes: one float32 tensor for all matrices that read it.
        block += 2 * FLOAT32 * architecture.hidden_size - _count_inputs(architecture, config.dtype)
    if trained.lora is not None:
        # A frozen norm keeps its input alone; every adapter keeps what its first matrix gives.
        block -= 2 * FLOAT32 * architecture.hidden_size if architecture.has_rms_norm else 0
        block += SIZES[config.dtype] * trained.lora.rank * trained.num_adapted / trained.num_layers
    return block


def _count_inputs(architecture: Architecture, dtype: DType) -> int:
    """Inputs of the matrices that read the residual stream, a token."""
    if dtype == "fp32":
        return 2 * FLOAT32 * architecture.hidden_size
    is_gated = architecture.activation == "silu"
    matrices = (1 if architecture.has_fused_projections else 3) + (2 if is_gated else 1)
    return matrices * SIZES["bf16"] * architecture.hidden_size


def _count_head(trained: Trained, batch: Batch, dtype: DType) -> float:
    """The output head: its bf16 copy and, if it is trained, its gradient, which comes first in the backward pass."""
    if batch.is_scoring:
        return 0.0
    numbers = trained.architecture.head_parameters
    copy = SIZES["bf16"] * numbers if dtype == "bf16" else 0
    if not trained.is_head_trained:
        return copy
    # Its float32 sum, and a part's product. By then the forward pass's logits are gone.
    part = SIZES[dtype] * min(TABLE_ROWS, trained.architecture.vocabulary) * trained.architecture.hidden_size
    residual = _count_logits(trained.architecture, batch) * (_RESIDUAL_BYTES[dtype] - _LOGITS_BYTES)
    return float(copy + FLOAT32 * numbers + part + residual)


def _count_logits(architecture: Architecture, batch: Batch) -> int:
    """Numbers of a chunk."""
    return min(count_rows(architecture.vocabulary), batch.completion_tokens) * architecture.vocabulary
