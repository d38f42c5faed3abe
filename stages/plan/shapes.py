"""What bytes are counted of: a micro-batch, a model under training, and their sum."""

import functools
from dataclasses import dataclass
from typing import Literal

from stages.data.batches import SharedSize, count_shared, split_by_prompts, split_by_tokens
from stages.learner.config import LoraConfig
from stages.models.load import TrainableLayers
from stages.plan.architecture import Architecture

DType = Literal["bf16", "fp32"]
FLOAT32 = 4
SIZES: dict[DType, int] = {"bf16": 2, "fp32": FLOAT32}
"""Bytes of a number."""


@dataclass(frozen=True)
class Batch:
    """The largest micro-batch that a setting allows, in tokens."""

    tokens: int
    """Of all its rows, padding included."""
    sequence_tokens: int
    """Of its longest row."""
    completion_tokens: int
    """Whose log-probabilities are computed; 0 for scores."""
    num_micro_batches: int = 2
    """Of a rank's update; from the second on, gradients are there when it begins."""
    attended_tokens: float | None = None
    """Keys that a computed token's attention probabilities span, on average; None: as many as the longest row has."""
    kept_keys: float = 1.0
    """Keys and values kept for each computed token: more than one where completions share a prompt, as each keeps the
    prompt's."""

    @property
    def is_scoring(self) -> bool:
        """Whether a reward or value model reads it."""
        return self.completion_tokens == 0


@dataclass(frozen=True)
class Trained:
    """What of a model is under training."""

    architecture: Architecture
    layers: TrainableLayers
    setting: str
    """Path of `layers`, for messages."""
    is_reward: bool = False
    """Whether it is a reward or value model."""
    lora: LoraConfig | None = None
    """Adapters that are trained in place of the weights."""

    @property
    def num_parameters(self) -> int:
        """Of the whole model, adapters included."""
        plain = self.architecture.num_reward_parameters if self.is_reward else self.architecture.num_parameters
        return plain + self.num_adapters

    @functools.cached_property
    def num_trained(self) -> int:
        """Parameters under training.

        Raises:
            SettingError: the model has fewer layers than `layers`, or no such layer as `lora` names.
        """
        head = self.architecture.hidden_size if self.is_reward else 0
        if self.lora is not None:
            return self.num_adapters + head
        if self.layers == "all":
            return self.num_parameters
        return self.architecture.count_trained(self.layers, self.setting) + head

    @property
    def num_layers(self) -> int:
        """L, blocks whose activations are kept."""
        return self.architecture.num_layers if self.layers == "all" else self.layers

    @property
    def num_in_blocks(self) -> int:
        """Parameters of those blocks and of the norm after them, frozen under adapters or not."""
        if self.layers == "all":
            tables = 1 if self.is_reward or self.architecture.config.tie_word_embeddings else 2
            return self.num_parameters - self.num_adapters - tables * self.architecture.head_parameters
        return self.architecture.count_trained(self.layers, self.setting)

    @property
    def is_head_trained(self) -> bool:
        """Whether a language model's output head is."""
        return self.layers == "all" and self.lora is None and not self.is_reward

    @property
    def num_adapters(self) -> int:
        """Numbers of all adapters: rank x (inputs + outputs) of each layer that has one (arXiv:2106.09685, 4.1)."""
        return 0 if self.lora is None else self.lora.rank * sum(sum(shape) for shape in self._adapted)

    @property
    def num_adapted(self) -> int:
        """Linear layers that have one."""
        return len(self._adapted)

    @functools.cached_property
    def _adapted(self) -> list[tuple[int, ...]]:
        if self.lora is None:
            return []
        return self.architecture.list_adapted(self.lora, self.layers, self.setting)


@dataclass(frozen=True)
class ModelBytes:
    """What one model needs on one device at the fullest moment of an update, in bytes."""

    weights: float = 0
    optimizer: float = 0
    """AdamW's moments, and DeepSpeed's copy of the trained weights."""
    gradients: float = 0
    activations: float = 0
    """What a forward pass keeps, with a chunk's logits; or what reducing gradients or the optimizer's step takes."""
    cache: float = 0
    """Keys and values of a generator."""
    host: float = 0
    """Offloaded from a GPU to main memory; not in `total`."""

    @property
    def total(self) -> float:
        """All of it that is on the device."""
        return self.weights + self.optimizer + self.gradients + self.activations + self.cache


def make_shared_batch(
    tokens: int, rows: int, prompt_tokens: int, completion_tokens: int, prompts: tuple[int, int], num_ranks: int = 1
) -> Batch:
    """The largest micro-batch of units that read the prompts they share once.

    Args:
        tokens: `micro_batch_tokens`.
        rows: completions of a unit.
        prompt_tokens: of the longest prompt.
        completion_tokens: of the longest completion.
        prompts: in the whole update, and units of each.
        num_ranks: that share its micro-batches.
    """
    num_prompts, num_units = prompts
    sizes = [
        SharedSize(prompt, prompt_tokens, rows, completion_tokens)
        for prompt in range(num_prompts)
        for _ in range(num_units)
    ]
    groups = split_by_prompts(sizes, tokens, num_ranks)
    largest = max(groups, key=lambda group: count_shared([sizes[unit] for unit in group]))
    of_prompts = len({sizes[unit].prompt for unit in largest}) * prompt_tokens
    of_completions, longest = len(largest) * rows * completion_tokens, prompt_tokens + completion_tokens
    computed = of_prompts + of_completions
    return Batch(
        computed,
        longest,
        of_completions,
        -(-len(groups) // num_ranks),
        attended_tokens=(of_prompts * prompt_tokens + of_completions * longest) / computed,
        kept_keys=(of_prompts + len(largest) * rows * longest) / computed,
    )


def make_batch(
    tokens: int, rows: int, sequence_tokens: int, completion_tokens: int, num_units: int, num_ranks: int = 1
) -> Batch:
    """The largest micro-batch of units of `rows` sequences, cut as the stages cut them.

    Args:
        tokens: `micro_batch_tokens`.
        rows: sequences that stay together.
        sequence_tokens: of the longest one.
        completion_tokens: of it, those whose log-probabilities are computed.
        num_units: in the whole update.
        num_ranks: that share its micro-batches.
    """
    unit = rows * sequence_tokens
    groups = split_by_tokens([unit] * num_units, tokens, num_ranks)
    size = unit * max(len(group) for group in groups)
    return Batch(size, sequence_tokens, size * completion_tokens // sequence_tokens, -(-len(groups) // num_ranks))
