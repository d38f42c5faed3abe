"""Which prompts each update gets: every prompt once an epoch, in an order that needs no state to resume."""

import random
from collections.abc import Sequence

from stages.data.seeds import derive_seed
from stages.generation.protocol import Request


def select_prompts(requests: Sequence[Request], update: int, prompts_per_update: int, seed: int) -> list[Request]:
    """The prompts of one update, each with a sampling seed of its own.

    Prompts are shuffled anew for each epoch; updates walk through the epochs end to end, so none is skipped and none
    repeated within one. An update may span two epochs.

    Args:
        requests: all training prompts.
        update: 0-based.
        prompts_per_update: how many.
        seed: of the run.
    """
    chosen = []
    for position in range(update * prompts_per_update, (update + 1) * prompts_per_update):
        epoch, place = divmod(position, len(requests))
        request = requests[_shuffled(len(requests), derive_seed(seed, "epoch", epoch))[place]]
        own = derive_seed(seed, "sample", position, request.prompt_id)
        chosen.append(Request(request.prompt_id, request.prompt_ids, own))
    return chosen


def _shuffled(length: int, seed: int) -> list[int]:
    order = list(range(length))
    random.Random(seed).shuffle(order)
    return order
