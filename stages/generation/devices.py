"""Which devices a child process is shown, in the words of CUDA and of vLLM's CPU build."""

import os

from stages.common.errors import SettingError
from stages.common.guard import parse_cores

_VISIBLE = "CUDA_VISIBLE_DEVICES"


def name_visible_gpus(devices: str) -> str:
    """What a child must be shown to have these of the GPUs that this process sees: by numbers, as CUDA knows no ranges.

    This process counts from 0 what it was shown itself, say the GPUs 4 and 5 of a worker; a child is shown anew.

    Raises:
        SettingError: this process was shown fewer.
    """
    shown = [name.strip() for name in os.environ.get(_VISIBLE, "").split(",") if name.strip()]
    numbers = sorted(parse_cores(devices))
    if not shown:
        return ",".join(map(str, numbers))
    if numbers[-1] >= len(shown):
        raise SettingError(f"devices {devices!r}: {_VISIBLE}={','.join(shown)} shows {len(shown)} GPUs, counted from 0")
    return ",".join(shown[number] for number in numbers)


def bind_cores(cores: str, num_workers: int) -> str:
    """Cores for each worker of a vLLM server on CPU, an equal share each, in vLLM's notation: 0,1|2,3.

    Raises:
        SettingError: fewer cores than workers.
    """
    if num_workers == 1:
        return cores
    numbers = sorted(parse_cores(cores))
    each = len(numbers) // num_workers
    if each == 0:
        raise SettingError(
            f"generation.engine_args asks for {num_workers} workers, and a server has the CPU cores {cores!r} only "
            "(generation.cpu_cores, in RL rl.generator.devices)"
        )
    shares = [numbers[index * each : (index + 1) * each] for index in range(num_workers)]
    return "|".join(",".join(map(str, share)) for share in shares)
