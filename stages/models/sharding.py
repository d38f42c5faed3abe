"""Models whose weights may be shared out over ranks (ZeRO-3): computing with them, and whole weights of them.

A shared-out weight is empty but for its place in DeepSpeed's shards. DeepSpeed brings it when the module that owns it
is called, and frees it afterwards; code that reads `module.weight` by itself would find nothing. Everything here is a
plain call where nothing is shared out.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)
P = ParamSpec("P")
R = TypeVar("R")


def is_shared_out(module: nn.Module) -> bool:
    """Whether DeepSpeed holds weights of the module in shards."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def call_as_forward(
    module: ModuleT, function: Callable[Concatenate[ModuleT, P], R], *arguments: P.args, **named: P.kwargs
) -> R:
    """`function(module, …)`, as the module's own forward where weights are shared out.

    Tensors with gradient must be among the arguments and results themselves or in lists and tuples of them, or the
    backward pass finds no weights.
    """
    if not is_shared_out(module):
        return function(module, *arguments, **named)

    def forward(*arguments: P.args, **named: P.kwargs) -> R:
        return function(module, *arguments, **named)

    module.forward = forward
    try:
        result: R = module(*arguments, **named)
    finally:
        del module.forward
    return result


@contextmanager
def gathered(*parameters: nn.Parameter) -> Iterator[None]:
    """The parameters are whole while this is open; every rank opens it."""
    shared = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not shared:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(shared):
        yield


def copy_whole(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of a whole parameter or buffer in another type; every rank calls it."""
    if not isinstance(tensor, nn.Parameter):
        return tensor.detach().to(dtype, copy=True).contiguous()
    with gathered(tensor):  # which frees it when it closes
        return tensor.detach().to(dtype, copy=True).contiguous()


def release_weights(module: nn.Module) -> None:
    """Empty the shards of a module that is done with: DeepSpeed keeps hold of modules that it has shared out."""
    for parameter in module.parameters():
        if hasattr(parameter, "ds_tensor"):
            for tensor in (parameter, parameter.ds_tensor):
                tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
