"""The stream of prompts: every prompt once a pass, in an order that needs no state to resume."""

import random
from collections.abc import Sequence

from stages.data.seeds import derive_seed
from stages.generation.protocol import Request


class PromptStream:
    """Prompts by ticket number: shuffled anew for each pass, passes end to end, none skipped and none repeated in one.

    Args:
        requests: all training prompts.
        seed: of the run.
    """

    def __init__(self, requests: Sequence[Request], seed: int) -> None:
        self._requests = requests
        self._seed = seed
        self._order: tuple[int, list[int]] = (-1, [])

    def get(self, ticket: int) -> Request:
        """The prompt of a ticket, with a sampling seed of its own."""
        number, place = divmod(ticket, len(self._requests))
        if self._order[0] != number:
            self._order = (number, _shuffled(len(self._requests), derive_seed(self._seed, "epoch", number)))
        request = self._requests[self._order[1][place]]
        own = derive_seed(self._seed, "sample", ticket, request.prompt_id)
        return Request(request.prompt_id, request.prompt_ids, own)


def _shuffled(length: int, seed: int) -> list[int]:
    order = list(range(length))
    random.Random(seed).shuffle(order)
    return order
