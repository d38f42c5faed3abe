"""Forward passes that begin or end in the middle of a model's blocks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from torch import Tensor
from transformers import PreTrainedModel

from stages.data.batches import TrunkStates
from stages.models.load import find_blocks

Forward = Callable[..., Tensor]


def read_states(model: PreTrainedModel, trunk: TrunkStates | None, number: int, **inputs: object) -> Tensor:
    """Last hidden states; where those behind the trunk are known, what lies below is not computed.

    Args:
        model: of one of the architectures whose blocks give a tensor.
        trunk: of the batch.
        number: of this pass among the batch's.
        inputs: of the base model. They still give masks and positions.
    """
    with nullcontext() if trunk is None else _beginning(model, trunk.depth, trunk.states[number]):
        states: Tensor = model.base_model(**inputs).last_hidden_state
        return states


@contextmanager
def ending(model: PreTrainedModel, depth: int) -> Iterator[list[Tensor]]:
    """Forward passes compute the first `depth` blocks alone; what these give is in the list, pass after pass."""
    seen: list[Tensor] = []

    def catch(hidden: Tensor, *_: object, **__: object) -> Tensor:
        seen.append(hidden)
        return hidden

    num_blocks = len(find_blocks(model))
    with _replaced(model, dict.fromkeys(range(depth, num_blocks), _pass_on) | {depth: catch}):
        yield seen


@contextmanager
def _beginning(model: PreTrainedModel, depth: int, states: Tensor) -> Iterator[None]:
    """Forward passes begin behind the first `depth` blocks with these states."""
    with _replaced(model, dict.fromkeys(range(depth - 1), _pass_on) | {depth - 1: lambda *_, **__: states}):
        yield


def _pass_on(hidden: Tensor, *_: object, **__: object) -> Tensor:
    return hidden


@contextmanager
def _replaced(model: PreTrainedModel, forwards: dict[int, Forward]) -> Iterator[None]:
    """Other forward functions in place of those of some blocks, by their numbers."""
    blocks = find_blocks(model)
    for number, forward in forwards.items():
        blocks[number].forward = forward
    try:
        yield
    finally:
        for number in forwards:
            del blocks[number].forward
