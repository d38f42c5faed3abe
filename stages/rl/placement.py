"""Which CPU cores or GPUs the generators and the learner get."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from stages.common.errors import SettingError
from stages.common.guard import parse_cores
from stages.generation.config import GenerationConfig, Publish
from stages.generation.engine_args import count_workers
from stages.learner.group import is_launched
from stages.models.load import select_device
from stages.rl.config import RlConfig


@dataclass(frozen=True)
class Placement:
    """Devices in the notation of the settings, such as 0-1."""

    generators: tuple[str, ...]
    """Of each local server."""
    learner: str

    @property
    def scoring(self) -> str:
        """Of a process that scores: the first server's; the learner's if all are elsewhere, where it has no place."""
        return self.generators[0] if self.generators else self.learner

    @property
    def scoring_cores(self) -> str:
        """The CPU cores such a process, with a thread for each core of `scoring`, may run on: the learner's too.

        The kernel puts its threads where a core is idle, which the learner's is while it waits for scores.
        """
        return _format(tuple(sorted(parse_cores(self.scoring) | parse_cores(self.learner))))


def place(config: RlConfig, available: tuple[int, ...], gpus_per_server: int | None = None) -> Placement:
    """Follow the settings, and fill in `auto`.

    Synchronous runs (`max_staleness` = U − 1) give everyone every CPU core, as only one side works at a time. Else
    generators get the first devices, an equal share each, and the learner the rest. GPUs are never shared as long as
    there are enough: each generator gets as many as its engine uses, and the learner the rest.

    Args:
        config: section `rl`.
        available: numbers of the cores or GPUs there are.
        gpus_per_server: that a server's engine uses; None: the devices are CPU cores, of which it uses any number.

    Raises:
        SettingError: too few devices for `auto`, a device that is not there, or not as many as a server uses.
    """
    everything = _format(available)
    taken = config.generator.devices
    is_synchronous = config.max_staleness == config.rule.cycle - 1 and gpus_per_server is None
    if taken == "auto" and gpus_per_server is not None:
        taken = _share_gpus(config, available, gpus_per_server)
    elif taken == "auto":
        taken = (everything,) * config.generator.replicas if is_synchronous else _share(config, available)
    for setting, devices in [("rl.generator.devices", item) for item in taken] + [
        ("rl.learner_devices", config.learner_devices)
    ]:
        _require_available(setting, devices, available)
    if gpus_per_server is not None:
        _require_number(taken, gpus_per_server)
    if config.learner_devices != "auto":
        return Placement(tuple(taken), config.learner_devices)
    used = {number for devices in taken for number in parse_cores(devices)}
    rest = tuple(number for number in available if number not in used)
    return Placement(tuple(taken), everything if is_synchronous or not rest else _format(rest))


def count_gpus(config: GenerationConfig) -> int | None:
    """How many GPUs one server uses; None on a machine without, or where nothing but a CPU would be used."""
    return count_workers(config.engine_args) if torch.cuda.is_available() and config.engine == "vllm" else None


def check_publish(config: RlConfig, placement: Placement) -> None:
    """Refuse a way of publishing weights that this placement does not have.

    Raises:
        SettingError: with what it needs.
    """
    if config.publish == "files":
        return
    if not torch.cuda.is_available():
        raise SettingError(f"rl.publish={config.publish!r} needs CUDA, and there is no GPU here; allowed: 'files'")
    require_reachable(config.publish, placement, config.generator.urls)
    if config.publish == "nccl" and config.generator.urls and config.learner.num_ranks > 1:
        _require_interface()


def _require_interface() -> None:
    """Ranks of one machine meet on its loopback interface, unless NCCL is told another."""
    if "NCCL_SOCKET_IFNAME" not in os.environ:
        raise SettingError(
            "rl.publish='nccl' with rl.generator.urls and rl.learner.num_ranks above 1: set NCCL_SOCKET_IFNAME to the "
            "network interface by which those servers reach this machine, or rl.publish to 'files'"
        )


def require_reachable(publish: Publish, placement: Placement, urls: Sequence[str]) -> None:
    """NCCL joins different GPUs, CUDA IPC processes on one.

    Raises:
        SettingError: with the devices that stand in the way.
    """
    learner = 0 if is_launched() else min(parse_cores(placement.learner))  # of rank 0, which publishes
    servers = [parse_cores(devices) for devices in placement.generators]
    if publish == "nccl" and any(learner in devices for devices in servers):
        raise SettingError(
            f"rl.publish='nccl': the learner's GPU {learner} is one of the generators' too, and NCCL joins different "
            "ones only; name others in rl.generator.devices or rl.learner_devices, or set 'ipc' or 'files'"
        )
    if publish == "ipc" and urls:
        raise SettingError(
            f"rl.publish='ipc': servers of rl.generator.urls, such as {urls[0]}, share no memory with the learner; "
            "allowed: 'nccl' or 'files'"
        )
    if publish == "ipc" and any(devices != {learner} for devices in servers):
        raise SettingError(
            f"rl.publish='ipc' needs every server on the learner's GPU {learner} alone, rl.generator.devices are "
            f"{', '.join(placement.generators)}; name that one, or set 'nccl' or 'files'"
        )


def check_launched(learner: str) -> None:
    """A launcher gives its ranks the first GPUs of this machine, whatever the settings say: they must be the learner's.

    Args:
        learner: its devices, such as 0-3.

    Raises:
        SettingError: a rank would train on another's GPU.
    """
    if not (torch.cuda.is_available() and is_launched()):
        return
    own = os.environ["LOCAL_RANK"]
    used = {int(own), *range(int(os.environ.get("LOCAL_WORLD_SIZE", "0")))}
    others = sorted(used - parse_cores(learner))
    if others:
        raise SettingError(
            f"rl.learner_devices: GPU {others[0]} is not among the learner's, {learner}, and a rank of the "
            f"launcher uses it, as they use GPU 0 to {max(used)}; give the generators the last GPUs by "
            "rl.generator.devices, or start fewer ranks"
        )


def pin_this_process(devices: str) -> None:
    """Keep this process's work on the learner's CPU cores, with a thread for each; or on its first GPU."""
    if torch.cuda.is_available():
        if not is_launched():  # a launcher has chosen; see `check_launched`
            os.environ["LOCAL_RANK"] = str(min(parse_cores(devices)))
        torch.cuda.set_device(select_device())
        return
    cores = parse_cores(devices)
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))


def _share(config: RlConfig, available: tuple[int, ...]) -> tuple[str, ...]:
    replicas = config.generator.replicas
    if replicas == 0:
        return ()
    if len(available) < 2:
        return (_format(available),) * replicas
    half = max(1, len(available) // 2)
    each = half // replicas
    if each == 0:
        raise SettingError(
            f"rl.generator.replicas={replicas} are too many for half of {len(available)} devices; name them in "
            "rl.generator.devices"
        )
    return tuple(_format(available[index * each : (index + 1) * each]) for index in range(replicas))


def _share_gpus(config: RlConfig, available: tuple[int, ...], each: int) -> tuple[str, ...]:
    replicas = config.generator.replicas
    if replicas * each > len(available):
        raise SettingError(
            f"rl.generator.replicas={replicas} need {each} GPUs each (generation.engine_args), and there are "
            f"{len(available)}; name them in rl.generator.devices"
        )
    return tuple(_format(available[index * each : (index + 1) * each]) for index in range(replicas))


def _require_number(taken: Sequence[str], each: int) -> None:
    for devices in taken:
        if len(parse_cores(devices)) != each:
            raise SettingError(
                f"rl.generator.devices={devices!r}: a server uses {each} GPUs, tensor x pipeline x data parallel of "
                f"generation.engine_args; name as many"
            )


def _require_available(setting: str, devices: str, available: tuple[int, ...]) -> None:
    if devices == "auto":
        return
    try:
        missing = sorted(parse_cores(devices) - set(available))
    except ValueError as error:
        raise SettingError(f"{setting}={devices!r}: {error}") from error
    if missing:
        raise SettingError(f"{setting}={devices!r}: {missing[0]} is not there; available: {_format(available)}")


def _format(numbers: tuple[int, ...]) -> str:
    return ",".join(str(number) for number in numbers)
