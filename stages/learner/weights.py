"""Weights of a model under training as a plain model has them: whole, adapters merged in."""

import torch
from torch import Tensor
from torch import distributed as dist
from transformers import PreTrainedModel

from stages.learner.lora import has_adapters, list_adapted, merge, plain_name
from stages.models.sharding import copy_whole, is_shared_out


def collect_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every weight once, in bf16: tied ones are stored under the name the library's own format uses.

    Where weights are shared out every rank calls it, and rank 0 alone gets them.
    """
    tied = set(getattr(model, "_tied_weights_keys", None) or [])
    is_tied = bool(model.config.tie_word_embeddings)
    tensors = model.state_dict(keep_vars=True).items()
    return _collect(model, {name: tensor for name, tensor in tensors if not (is_tied and name in tied)})


def collect_trained(model: PreTrainedModel) -> dict[str, Tensor]:
    """`collect_weights` of those that training changes.

    With adapters these are the layers that have one, and those beside them in their block's attention or MLP: vLLM
    packs some of these into one, such as queries, keys and values, and takes that only whole.
    """
    changed = {_parent(name) for name in list_adapted(model)} if has_adapters(model) else set()
    named = model.named_parameters()  # names a tied weight once
    return _collect(
        model, {name: tensor for name, tensor in named if tensor.requires_grad or _parent(plain_name(name)) in changed}
    )


def _parent(name: str | None) -> str | None:
    """Module that holds the layer of a weight: `model.layers.0.self_attn` of `….self_attn.q_proj.weight`."""
    return None if name is None else name.rsplit(".", 2)[0]


def _collect(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    is_shared = is_shared_out(model)
    adapted = list_adapted(model) if has_adapters(model) else {}
    collected = {}
    for name, tensor in tensors.items():
        plain = plain_name(name)
        if plain is None:
            continue
        layer = adapted.get(plain)
        whole = copy_whole(tensor, torch.bfloat16) if layer is None else merge(layer).to(torch.bfloat16)
        if not is_shared:
            collected[plain] = whole
        elif dist.get_rank() == 0:  # the model may be larger than a device: it is put together in main memory
            collected[plain] = whole.cpu()
    return collected
