"""New weights from the learner's memory into a server's, by vLLM's own weight-transfer engines: what all ways share.

A server is told, in this order, on its development endpoints (vLLM 0.32, `entrypoints/rl/online/api_router.py`):

    /pause                            idle or not: until the end it holds no whole model and must not take a step
    /collective_rpc begin_transfer    refuses a part of a fused layer (vllm_worker.py)
    /start_weight_update
    /update_weights                   once a chunk: names, types and shapes; the tensors take the channel
    /finish_weight_update
    /collective_rpc end_transfer      packs tied heads again
    /update_weight_version, /reset_prefix_cache, /resume; then version and probe, as after files

Each server has a channel of its own and swaps by itself. By NCCL one that hangs in the middle of a broadcast keeps the
others waiting until it is given up: vLLM's packed broadcast takes its CUDA streams from a cache, by device.
"""

import asyncio
import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from stages.generation.vllm_client import VllmClient

CHUNK_BYTES = 2**28
"""Whole layers are sent together up to this size: each chunk costs a request, and its size in memory on both sides."""

Tensors = Mapping[str, Tensor]
MakeChannel = Callable[[torch.device], "Channel"]
"""A way from this device, on which the tensors lie."""
T = TypeVar("T")


class Channel(Protocol):
    """The way into one server, for as long as the server lives."""

    async def open(self, client: VllmClient) -> None:
        """Meet the server's workers.

        Raises:
            GeneratorError, httpx.HTTPError: the server refused, or failed.
        """

    async def send(self, client: VllmClient, tensors: Tensors) -> None:
        """Send all tensors, between `start_transfer` and `finish_transfer`.

        Raises:
            GeneratorError, httpx.HTTPError: the server refused, or failed.
        """

    def close(self) -> None:
        """Give up what is under way and let go of the server. May block for seconds, and be called twice."""


async def transfer(client: VllmClient, channel: Channel, tensors: Tensors) -> None:
    """Put tensors in the place of a paused server's own; those that are not named stay as they are.

    Args:
        client: of the server.
        channel: open.
        tensors: by the names of the model's files, layer after layer; nothing may write into them meanwhile.

    Raises:
        GeneratorError, httpx.HTTPError: the server refused, or failed; what weights it has is then unknown.
    """
    names = list(tensors)
    await client.start_transfer(names)
    await channel.send(client, tensors)
    await client.finish_transfer(names)


def describe(tensors: Tensors) -> dict[str, Any]:
    """What a server must know of tensors to take them."""
    return {
        "names": list(tensors),
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()],
        "shapes": [list(tensor.shape) for tensor in tensors.values()],
    }


def split_by_layers(tensors: Tensors, chunk_bytes: int = CHUNK_BYTES) -> Iterator[dict[str, Tensor]]:
    """The same in the same order, whole layers together, in chunks of at most `chunk_bytes` or a single layer."""
    chunk: dict[str, Tensor] = {}
    num_bytes = 0
    for layer in _layers(tensors):
        size = sum(tensor.nbytes for tensor in layer.values())
        if chunk and num_bytes + size > chunk_bytes:
            yield chunk
            chunk, num_bytes = {}, 0
        chunk |= layer
        num_bytes += size
    if chunk:
        yield chunk


async def run_aside(work: Callable[[], T]) -> T:
    """Run something that blocks, in a thread that holds up nobody: if this is cancelled it is left to itself.

    asyncio's own threads would be waited for at the end of the loop, and a broadcast to a dead server never ends.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(set_outcome: Callable[[], None]) -> None:
        if not done.cancelled():
            set_outcome()

    def run() -> None:
        try:
            result = work()
        except Exception as error:  # noqa: BLE001  raised again where this is awaited
            outcome = functools.partial(done.set_exception, error)
        else:
            outcome = functools.partial(done.set_result, result)
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits
            loop.call_soon_threadsafe(settle, outcome)

    threading.Thread(target=run, name="transfer", daemon=True).start()
    return await done


def _layers(tensors: Tensors) -> Iterator[dict[str, Tensor]]:
    """Neighbours of one layer: the names agree up to their first number."""
    layer: dict[str, Tensor] = {}
    last: tuple[str, ...] | None = None
    for name, tensor in tensors.items():
        parts = name.split(".")
        number = next((index for index, part in enumerate(parts) if part.isdigit()), None)
        key = (name,) if number is None else tuple(parts[: number + 1])
        if layer and key != last:
            yield layer
            layer = {}
        layer[name], last = tensor, key
    if layer:
        yield layer
