"""The shape of a model that need not be here: its config on the meta device, where parameters have no bytes."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from stages.common.errors import InputError
from stages.learner.config import LoraConfig
from stages.learner.lora import find_targets
from stages.models.config import HubSource, ModelConfig, PackageSource, PathSource
from stages.models.load import TrainableLayers, find_blocks, list_linear, select_trainable
from stages.models.shorten import shorten_config
from stages.plan.settings import Places

KNOWN = Path(__file__).parent / "architectures"
"""Configs of public models by hub id or package file: {"names": […], "config": {…}}."""


@dataclass(frozen=True)
class Architecture:
    """What memory is counted from."""

    config: PretrainedConfig
    source: str
    """Where the config is from: a directory, or a file of `KNOWN`."""

    @functools.cached_property
    def model(self) -> PreTrainedModel:
        """The model without bytes."""
        return _build(self.config)

    @functools.cached_property
    def num_parameters(self) -> int:
        """All parameters, a tied matrix once."""
        return count_parameters(self.model)

    @functools.cached_property
    def num_reward_parameters(self) -> int:
        """Those of a reward or value model of this shape: without output embeddings, with a head of one output."""
        return count_parameters(self.model.base_model) + self.hidden_size

    @functools.cached_property
    def num_linear(self) -> int:
        """Parameters of what `load_frozen` keeps in the compute type: of linear layers, an untied head included."""
        return sum(count_parameters(layer) for layer in list_linear(self.model))

    @property
    def num_layers(self) -> int:
        """Transformer blocks."""
        return int(self.config.num_hidden_layers)

    @property
    def hidden_size(self) -> int:
        """H."""
        return int(self.config.hidden_size)

    @property
    def vocabulary(self) -> int:
        """V, rows of the embeddings."""
        return int(self.config.vocab_size)

    @property
    def num_heads(self) -> int:
        """Attention heads."""
        return int(self.config.num_attention_heads)

    @property
    def head_size(self) -> int:
        """Numbers of one head."""
        return int(getattr(self.config, "head_dim", None) or self.hidden_size // self.num_heads)

    @property
    def num_key_value_heads(self) -> int:
        """Heads whose keys and values are kept."""
        return int(getattr(self.config, "num_key_value_heads", None) or self.num_heads)

    @property
    def intermediate_size(self) -> int:
        """I, width of the feed-forward part."""
        for name in ("intermediate_size", "ffn_dim", "n_inner"):
            if value := getattr(self.config, name, None):
                return int(value)
        return 4 * self.hidden_size

    @property
    def activation(self) -> str:
        """Name of the feed-forward part's activation."""
        return str(getattr(self.config, "hidden_act", None) or getattr(self.config, "activation_function", "gelu"))

    @property
    def has_rms_norm(self) -> bool:
        """Whether its norms are RMS norms, which are made of several operations and keep more."""
        return hasattr(self.config, "rms_norm_eps")

    @property
    def has_fused_projections(self) -> bool:
        """Whether queries, keys and values come out of one matrix."""
        return self.config.model_type in ("gpt_neox", "gpt2")

    @property
    def context(self) -> int | None:
        """Longest sequence, in tokens; None if its config names none."""
        value = getattr(self.config, "max_position_embeddings", None)
        return None if value is None else int(value)

    @property
    def head_parameters(self) -> int:
        """Of the output embeddings."""
        return self.vocabulary * self.hidden_size

    def count_trained(self, layers: TrainableLayers, setting: str) -> int:
        """Parameters under training.

        Args:
            layers: all, or the top n.
            setting: its path, for the message.

        Raises:
            SettingError: the model has fewer layers.
        """
        model = _build(self.config)
        select_trainable(model, layers, setting)
        return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

    def count_below(self, size: int) -> int:
        """Numbers in parameters of fewer than `size` numbers each."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.numel() < size)

    def list_adapted(self, lora: LoraConfig, layers: TrainableLayers, setting: str) -> list[tuple[int, ...]]:
        """Inputs and outputs of every linear layer that gets an adapter, in either order.

        Args:
            lora: which layers.
            layers: all, or the top n.
            setting: path of `layers`, for the message.

        Raises:
            SettingError: layers that are not there.
        """
        model = _build(self.config)
        select_trainable(model, layers, setting)
        names = find_targets(model, lora, layers, setting.removesuffix(".trainable_layers"))
        return [tuple(model.get_parameter(f"{name}.weight").shape) for name in names]


def find_architecture(model: ModelConfig, places: Places) -> Architecture:
    """The base model's shape: from artifacts/base, from the directory that `model` names, or from what is known.

    Args:
        model: section `model`.
        places: where to look.

    Raises:
        InputError: none of them has it.
        SettingError: it has fewer layers than `model.keep_layers`.
    """
    match model.source:
        case PathSource(path=path):
            found, name = read_architecture(places.inputs / path), path
        case HubSource(repo=repo):
            found, name = find_known(repo), repo
        case PackageSource(file=file):
            found, name = find_known(file), file
    if found is not None:
        shorten_config(found.config, model.keep_layers)
        return found
    # It has as many layers as were kept when it was made.
    found = read_architecture(places.artifacts / "artifacts/base") if places.has_made(model) else None
    if found is None:
        known = ", ".join(sorted(name for item in _read_known() for name in item["names"]))
        raise InputError(
            f"model.source {name!r}: its shape is not known and it is not here; run `make run STAGE=prepare_model` "
            f"first, or use one of {known}"
        )
    return found


def read_architecture(directory: Path) -> Architecture | None:
    """Of a model directory; None if there is none.

    Raises:
        InputError: its config.json cannot be read.
    """
    if not (directory / "config.json").is_file():
        return None
    try:
        return Architecture(AutoConfig.from_pretrained(directory, trust_remote_code=False), str(directory))
    except (OSError, ValueError) as error:
        raise InputError(f"{directory}/config.json: not a readable config: {str(error).splitlines()[0]}") from error


def find_known(name: str) -> Architecture | None:
    """Of a public model by its hub id or package file."""
    for item in _read_known():
        if name in item["names"]:
            return Architecture(AutoConfig.for_model(**item["config"]), f"known: {item['file']}")
    return None


def count_parameters(model: nn.Module) -> int:
    """All parameters, a shared one once."""
    return sum(parameter.numel() for parameter in model.parameters())


@functools.cache
def _read_known() -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) | {"file": path.name} for path in sorted(KNOWN.glob("*.json"))]


def _build(config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    find_blocks(model)  # refuses what `select_trainable` could not handle
    return model
