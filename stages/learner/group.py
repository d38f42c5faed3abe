"""Joining the other ranks: alone, as rank 0 that starts them, as one of those, or as a launcher says.

Gradients travel through the default group, over NCCL or gloo. What the leader wants done and what came of it travel
through two groups of their own, over gloo: a follower waits for work as long as it takes, a result is overdue at some
point.
"""

import functools
import logging
import os
import socket
import warnings
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed as dist
from torch._C._distributed_c10d import HashStore, Store, TCPStore

from stages.learner.heap import keep_freed_memory
from stages.models.load import select_device

PATIENCE = timedelta(minutes=30)
"""How long a rank waits for the others in the middle of something before it takes them for hung."""
_FOR_EVER = timedelta(days=3650)
_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Group:
    """The ranks as this one sees them."""

    rank: int
    size: int
    calls: dist.ProcessGroup
    results: dist.ProcessGroup


def is_launched() -> bool:
    """Whether a launcher such as `deepspeed` or `torchrun` started this process as one of its ranks."""
    return "RANK" in os.environ


@functools.cache
def join_alone() -> None:
    """Make a group of this process alone, or join the launcher's; a group that is there already is kept."""
    _prepare()
    if not is_launched() and not dist.is_initialized():
        # In this process's memory: a single rank meets nobody.
        _join(HashStore(), rank=0, size=1)
    _tell_deepspeed()


def join_launched() -> Group:
    """Join the ranks that a launcher started."""
    _prepare()
    _tell_deepspeed()
    return _make_group()


def listen() -> socket.socket:
    """A socket on the loopback interface, where the ranks of this machine find each other."""
    listener = socket.socket()
    listener.bind((_LOOPBACK, 0))
    listener.listen()
    return listener


def join_started(rank: int, size: int, address: socket.socket | int) -> Group:
    """Join the ranks of this machine.

    Args:
        rank: ours; the leader is 0.
        size: how many there are.
        address: the leader's own listening socket, for the others its port.
    """
    _prepare(rank)
    # Neither shall look for an interface that others can reach; NCCL may be told one, for servers elsewhere.
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    if isinstance(address, int):
        store: Store = TCPStore(_LOOPBACK, address, size, is_master=False, timeout=PATIENCE)
    else:
        port = address.getsockname()[1]
        descriptor = address.detach()  # the store closes it
        store = TCPStore(
            _LOOPBACK, port, size, is_master=True, timeout=PATIENCE, wait_for_workers=False, master_listen_fd=descriptor
        )
    _join(store, rank, size)
    _tell_deepspeed()
    return _make_group()


def leave() -> None:
    """Take the process group down."""
    dist.destroy_process_group()


def _prepare(rank: int = 0) -> None:
    import deepspeed.ops

    keep_freed_memory()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls them by names that torch has given up.
    warnings.filterwarnings("ignore", r"`torch.distributed.\w+_tensor` is deprecated", FutureWarning)
    # DeepSpeed insists on this one. RANK stays unset: child processes would take it for a launcher's.
    os.environ.setdefault("LOCAL_RANK", str(rank))
    # Its reduction through shared memory would have to be built first, with a compiler and in 20 seconds.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _join(store: Store, rank: int, size: int) -> None:
    dist.init_process_group(_backend(), store=store, rank=rank, world_size=size, timeout=PATIENCE)


def _tell_deepspeed() -> None:
    import deepspeed

    deepspeed.init_distributed(_backend(), auto_mpi_discovery=False, verbose=False, timeout=PATIENCE)
    if torch.cuda.is_available():
        torch.cuda.set_device(select_device())


def _make_group() -> Group:
    calls = dist.new_group(backend="gloo", timeout=_FOR_EVER)
    results = dist.new_group(backend="gloo", timeout=PATIENCE)
    return Group(dist.get_rank(), dist.get_world_size(), calls, results)


def _backend() -> str:
    return "nccl" if torch.cuda.is_available() else "gloo"
