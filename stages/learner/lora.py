"""Low-rank adapters on a model in place: what is trained, the model without them, and merged weights.

Paper: Hu et al. 2021, arXiv:2106.09685, section 4: a layer W x becomes W x + (alpha / rank) B A x, A drawn at random,
B zero. Departures: no dropout; A comes from a seed of its own, so that every rank and every start draws the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from stages.common.errors import SettingError
from stages.learner.config import LoraConfig
from stages.models.load import LINEAR, TrainableLayers, find_blocks, freeze, select_trainable
from stages.models.sharding import gathered

ADAPTER = "default"
_BASE = ".base_layer."
_SEED = 0


class AdaptedLayer(Protocol):
    """What is used of the library's layer."""

    base_layer: nn.Linear

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those of the layer and of its adapter."""

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the adapter on or off."""

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to the weight."""


def add_adapters(model: PreTrainedModel, config: LoraConfig, layers: TrainableLayers, setting: str) -> None:
    """Freeze the model and put adapters beside linear layers of all blocks, or of the top `layers`.

    Args:
        model: changed in place; before the first update it computes what it did.
        config: rank, scale, which layers.
        layers: "all", or how many blocks counted from the output.
        setting: path of the learner's settings, such as `sft.learner`.

    Raises:
        SettingError: a target that is no linear layer of a block, or blocks that are not there.
    """
    # Takes seconds to import, and only this needs it.
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    select_trainable(model, layers, f"{setting}.trainable_layers")
    names = find_targets(model, config, layers, setting)
    freeze(model)
    settings = PeftConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules=names,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    inject_adapter_in_model(settings, model, ADAPTER)
    generator = torch.Generator().manual_seed(_SEED)
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            bound = parameter.shape[1] ** -0.5
            values = (torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound
            with torch.no_grad():
                parameter.copy_(values)
    model.eval()


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model as it was before adapters were added, while this is open."""
    layers = list_adapted(model).values()
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def has_adapters(model: nn.Module) -> bool:
    """Whether `add_adapters` was called with it."""
    return bool(list_adapted(model))


def plain_name(name: str) -> str | None:
    """What a parameter is called in the model without adapters; None: it is an adapter's."""
    return None if ".lora_A." in name or ".lora_B." in name else name.replace(_BASE, ".")


def merge(layer: AdaptedLayer) -> Tensor:
    """The weight that does the work of a layer and its adapter. Every rank calls it, as it may gather."""
    with gathered(*layer.parameters()), torch.no_grad():
        return layer.base_layer.weight.float() + layer.get_delta_weight(ADAPTER).float()


def list_adapted(model: nn.Module) -> dict[str, AdaptedLayer]:
    """Layers with an adapter, by the plain name of the weight it adds to."""
    # By attribute, so that a model without adapters needs no import of the library.
    return {
        f"{name}.weight": cast(AdaptedLayer, module)
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "base_layer")
    }


def find_targets(model: PreTrainedModel, config: LoraConfig, layers: TrainableLayers, setting: str) -> list[str]:
    """Names of the linear layers that get an adapter; see `add_adapters`.

    Raises:
        SettingError: a target that is no linear layer of a block.
    """
    blocks = find_blocks(model)
    chosen = set(blocks if layers == "all" else blocks[len(blocks) - layers :])
    inside = {id(module) for block in chosen for module in block.modules()}
    linear = [name for name, module in model.named_modules() if isinstance(module, LINEAR) and id(module) in inside]
    if config.targets == "all":
        return linear
    known = sorted({name.rpartition(".")[2] for name in linear})
    for target in config.targets:
        if target not in known:
            raise SettingError(
                f"{setting}.lora.targets={target!r}: no such linear layer; allowed: 'all' or any of {', '.join(known)}"
            )
    return [name for name in linear if name.rpartition(".")[2] in config.targets]
