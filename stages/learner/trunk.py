"""The trunk: frozen lower blocks that policy, reference and value model have in common, computed once for a batch.

With `trainable_layers: n` these models differ in their upper n blocks only. What the blocks below give is kept with
the batch, and every pass begins there: the reference's, the learner's in each epoch, the value model's. All of them
compute the same numbers as without, to the last bit. trlX calls the idea hydra heads (Havrilla et al. 2023), with a
reference of the upper blocks alone; here every model stays whole, and the states behind the trunk go with the batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import takewhile, zip_longest

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stages.data.batches import SequenceBatch, TrunkStates
from stages.learner.logprobs import select_predictors
from stages.models.blocks import ending
from stages.models.load import find_blocks, find_final_norms
from stages.models.shared_prompts import ARCHITECTURES

MAX_BYTES = 64 * 2**20
"""Of the states kept for an update; beyond it every model computes its own, for the sake of memory."""


def count_trunk(*models: PreTrainedModel) -> int:
    """How many lower blocks none of these models trains, and all have with the same weights.

    Weights of different types count as the same if they are in the coarser one, which then is the compute type.
    """
    first, *others = models
    if any(model.config.model_type not in ARCHITECTURES for model in models):
        return 0
    depth = min(_count_frozen(model) for model in models)
    if not all(_are_same(_below_blocks(first), _below_blocks(other)) for other in others):
        return 0
    stacks = [find_blocks(model) for model in models]
    same = (
        all(_are_same(stacks[0][number].parameters(), stack[number].parameters()) for stack in stacks[1:])
        for number in range(depth)
    )
    return sum(takewhile(bool, same))


def read_trunks(model: PreTrainedModel, batches: Sequence[SequenceBatch], depth: int) -> list[SequenceBatch]:
    """The same batches with what the first `depth` blocks give for them, unless that takes more than `MAX_BYTES`.

    Args:
        model: any that has the trunk.
        batches: of an update.
        depth: of the trunk; with 0 nothing is read.
    """
    numbers = sum(batch.num_computed_tokens for batch in batches) * model.config.hidden_size
    if not depth or numbers * torch.float32.itemsize > MAX_BYTES:
        return list(batches)
    return [replace(batch, trunk=_read_trunk(model, batch, depth)) for batch in batches]


@torch.no_grad()
def _read_trunk(model: PreTrainedModel, batch: SequenceBatch, depth: int) -> TrunkStates:
    with ending(model, depth) as states:
        select_predictors(model, batch)
    return TrunkStates(depth, tuple(states))


def _count_frozen(model: PreTrainedModel) -> int:
    """Blocks below the first that is trained; 0 if something below them is, and at least the last one is left out."""
    if any(parameter.requires_grad for parameter in _below_blocks(model)):
        return 0
    *lower, _ = find_blocks(model)
    return sum(1 for _ in takewhile(lambda block: not any(p.requires_grad for p in block.parameters()), lower))


def _below_blocks(model: PreTrainedModel) -> Iterator[Tensor]:
    """Embeddings, and what else stands in front of the first block."""
    blocks = find_blocks(model)
    above = [parameter for norm in find_final_norms(model, blocks) for parameter in norm.parameters()]
    known = {id(parameter) for parameter in (*blocks.parameters(), *above)}
    return (parameter for parameter in model.base_model.parameters() if id(parameter) not in known)


def _are_same(mine: Iterator[Tensor], others: Iterator[Tensor]) -> bool:
    pairs = zip_longest(mine, others)
    return all(a is not None and b is not None and _is_same(a, b) for a, b in pairs)


def _is_same(a: Tensor, b: Tensor) -> bool:
    dtype = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    return a.shape == b.shape and torch.equal(a.to(dtype), b.to(dtype))
