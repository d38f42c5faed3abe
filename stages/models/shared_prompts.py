"""Completions of one prompt read the prompt once: its keys and values are computed once and attended to by all of them.

In exact arithmetic nothing changes, gradients included: what a prompt's tokens give to each of its completions adds up
at the shared keys and values. With K completions a prompt's tokens cost a K-th of what they do in K padded rows.

Departures from others: prefix sharing is known from inference (arXiv:2402.05099); for training it is usually done with
an attention mask over one long row, whose scores between completions are computed and thrown away. Here they are not.

Shapes: B completions of G prompts, P tokens of the longest prompt, T of the longest completion, H hidden size.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from stages.data.batches import SequenceBatch
from stages.models.blocks import read_states

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gpt_neox", "gpt2", "opt")
"""Model types whose completions see a prompt through its keys and values alone."""


def can_share_prompts(model: PreTrainedModel) -> bool:
    """Whether `read_shared` gives what the model gives on whole rows.

    Not where layers look back a limited distance only, nor with gradient checkpointing, which keeps no keys.
    """
    config = model.config
    layers = getattr(config, "layer_types", None) or ()
    is_windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    is_plain = not is_windowed and all(layer == "full_attention" for layer in layers)
    return config.model_type in ARCHITECTURES and is_plain and not model.is_gradient_checkpointing


def read_shared(model: PreTrainedModel, batch: SequenceBatch, *, with_last: bool = False) -> Tensor:
    """Hidden state before each completion token; what stands on padding means nothing. [B, T, H]

    Args:
        model: `can_share_prompts` of it.
        batch: collated with shared prompts.
        with_last: and the state at the last token, which nothing follows. [B, T + 1, H]
    """
    assert batch.prompts is not None
    assert not (with_last and batch.trunk)
    first, owner = batch.prompts.rows, batch.prompts.owner
    lengths = batch.prompt_lengths[first]  # [G]
    width = int(lengths.max())
    prompt_mask = _count(width, lengths) < lengths[:, None]  # [G, P]
    cache = DynamicCache()
    states = read_states(
        *(model, batch.trunk, 0),
        input_ids=batch.input_ids[first, :width],
        attention_mask=prompt_mask,
        past_key_values=cache,
        use_cache=True,
    )  # [G, P, H]
    before = _hand_out(states[torch.arange(len(first), device=states.device), lengths - 1], owner)[:, None]  # [B, 1, H]
    num_states = batch.completion_ids.shape[1] + with_last
    # A single token is read all the same: ranks that share weights out must all make the same calls.
    ids = batch.completion_ids[:, : max(1, num_states - 1)]
    _hand_out_cache(cache, owner, width)
    states = read_states(
        *(model, batch.trunk, 1),
        input_ids=ids,
        attention_mask=torch.cat([prompt_mask[owner], batch.completion_mask[:, : ids.shape[1]]], dim=1),
        position_ids=batch.prompt_lengths[:, None] + _count(ids.shape[1], lengths),
        past_key_values=cache,
        use_cache=True,
    )  # [B, max(1, T - 1), H] or [B, T, H]
    return torch.cat([before, states], dim=1)[:, :num_states]


def _count(length: int, like: Tensor) -> Tensor:
    return torch.arange(length, device=like.device)


def _hand_out_cache(cache: DynamicCache, owner: Tensor, num_tokens: int) -> None:
    for layer in cache.layers:
        assert isinstance(layer, DynamicLayer)
        if not layer.is_initialized:  # of the trunk; masks are made for as many keys as the first layer has
            nothing = owner.new_zeros(len(owner), 1, num_tokens, 1)
            layer.update(nothing, nothing)
            continue
        assert layer.keys is not None
        assert layer.values is not None
        layer.keys, layer.values = _hand_out(layer.keys, owner), _hand_out(layer.values, owner)


def _hand_out(of_prompts: Tensor, owner: Tensor) -> Tensor:
    """Each completion's row of its prompt. [G, …] -> [B, …]"""
    handed: Tensor = _HandOut.apply(of_prompts, owner)  # type: ignore[no-untyped-call]
    return handed


class _HandOut(torch.autograd.Function):
    """`of_prompts[owner]`, whose gradient is summed in the same order every time.

    The library's own adds with atomic operations, on several threads in whatever order they come.
    """

    @staticmethod
    def forward(ctx: Any, of_prompts: Tensor, owner: Tensor) -> Tensor:
        ctx.save_for_backward(owner)
        ctx.num_prompts = len(of_prompts)
        return of_prompts.index_select(0, owner)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (owner,) = ctx.saved_tensors
        is_of = torch.arange(ctx.num_prompts, device=owner.device)[:, None] == owner  # [G, B]
        summed = is_of.to(grad.dtype) @ grad.flatten(1)
        return summed.view(ctx.num_prompts, *grad.shape[1:]), None
