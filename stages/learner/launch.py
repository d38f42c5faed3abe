"""The ranks of a stage: started by its own process, or by a launcher such as `torchrun`."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from stages.common.errors import SettingError
from stages.learner.config import LearnerConfig
from stages.learner.follower import follow_launched
from stages.learner.group import Group, is_launched, join_launched, join_started, leave, listen
from stages.learner.processes import Followers, start_followers
from stages.learner.ranks import LedRanks, Ranks


@contextmanager
def open_ranks(config: LearnerConfig, setting: str, log_dir: Path, devices: Sequence[int]) -> Iterator[Ranks]:
    """The ranks of a stage, started here or by a launcher; the models they hold are gone when this closes.

    Args:
        config: how many.
        setting: path of the learner's settings, such as `sft.learner`.
        log_dir: where ranks that are started here write their logs.
        devices: GPUs or CPU cores they may use.

    Raises:
        SettingError: fewer GPUs than ranks, or a launcher started another number of them.
    """
    if config.num_ranks == 1 and not is_launched():
        yield Ranks()
        return
    group, followers = _join(config.num_ranks, setting, log_dir, devices)
    ranks = LedRanks(group, followers)
    try:
        yield ranks
        ranks.end()
    finally:
        followers.kill()
    leave()


def serve_leader(config: LearnerConfig, setting: str, *, has_work: bool = True) -> bool:
    """Whether a launcher made this process one of the other ranks; returns when the leader has let it go.

    Args:
        config: of the learner.
        setting: path of its settings, such as `sft.learner`.
        has_work: whether the leader will open its ranks. One that never does would be waited for without end.

    Raises:
        SettingError: the launcher started another number of ranks than the settings say.
    """
    if not is_launched() or os.environ["RANK"] == "0":
        return False
    _require_launched(config.num_ranks, setting)
    if has_work:
        follow_launched()
    return True


def _join(num_ranks: int, setting: str, log_dir: Path, devices: Sequence[int]) -> tuple[Group, Followers]:
    if is_launched():
        _require_launched(num_ranks, setting)
        return join_launched(), Followers([])
    is_gpu = torch.cuda.is_available()
    if is_gpu and len(devices) < num_ranks:
        raise SettingError(
            f"{setting}.num_ranks={num_ranks}: the learner has {len(devices)} GPUs; allowed: at most that many"
        )
    listener = listen()
    cores = os.sched_getaffinity(0) if is_gpu else devices  # beside GPUs they run offloaded optimizers
    num_threads = max(1, len(cores) // num_ranks)
    torch.set_num_threads(num_threads)
    local_ranks = list(devices[:num_ranks]) if is_gpu else list(range(num_ranks))
    followers = start_followers(listener.getsockname()[1], local_ranks, num_threads, log_dir)
    try:
        with followers.watched():
            return join_started(0, num_ranks, listener), followers
    except BaseException:
        followers.kill()
        raise


def _require_launched(num_ranks: int, setting: str) -> None:
    launched = int(os.environ["WORLD_SIZE"])
    if launched != num_ranks:
        raise SettingError(
            f"{setting}.num_ranks={num_ranks}: the launcher started {launched} ranks; set both to the same number"
        )
