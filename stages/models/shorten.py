"""A smaller model made from a larger one: evenly spaced layers of it, to be taught again by SFT.

Paper: Sanh et al. 2019, arXiv:1910.01108, section 3, starts a student from every second layer of its teacher.
Departures: any number of layers, and no loss on the teacher's logits: the student is taught by demonstrations alone.
"""

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from stages.common.errors import SettingError
from stages.models.load import TrainableLayers, find_blocks


def choose_layers(num_layers: int, keep: int) -> list[int]:
    """Which layers of `num_layers` are kept: the first, the last, and the others evenly between them.

    Raises:
        SettingError: there are fewer.
    """
    if keep > num_layers:
        raise SettingError(
            f"model.keep_layers={keep}: the model of model.source has {num_layers} layers; "
            f"allowed: 'all' or 2…{num_layers}"
        )
    gaps = keep - 1
    return [(2 * place * (num_layers - 1) + gaps) // (2 * gaps) for place in range(keep)]  # rounded, halves up


def shorten_config(config: PretrainedConfig, keep: TrainableLayers) -> None:
    """Make a config that of the smaller model, in place.

    Raises:
        SettingError: the model has fewer layers.
    """
    if keep == "all":
        return
    chosen = choose_layers(config.num_hidden_layers, keep)
    types: list[str] | None = getattr(config, "layer_types", None)  # of each layer, such as sliding attention
    if types is not None:
        config.layer_types = [types[index] for index in chosen]
    config.num_hidden_layers = keep


def shorten_model(model: PreTrainedModel, keep: TrainableLayers) -> None:
    """Leave only the kept layers in a model that is then saved, in place; everything else stays as it is.

    Its layers still carry the numbers that they had, by which they would find their keys and values in a cache: save it
    and load it again to sample from it.

    Raises:
        SettingError: the model has fewer layers.
        InputError: its list of layers is not found.
    """
    if keep == "all":
        return
    blocks = find_blocks(model)
    chosen = choose_layers(len(blocks), keep)
    _replace(model, blocks, nn.ModuleList(blocks[index] for index in chosen))
    shorten_config(model.config, keep)


def _replace(model: nn.Module, old: nn.ModuleList, new: nn.ModuleList) -> None:
    for module in model.modules():
        for name, child in module.named_children():
            if child is old:
                setattr(module, name, new)
                return
