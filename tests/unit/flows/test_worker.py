import os

import pytest
import torch

from flows.worker import find_devices, make_environment
from stages.common.errors import SettingError


def test_a_worker_of_cores_sees_no_gpu_and_one_of_gpus_its_own() -> None:
    assert make_environment("cpu:0")["CUDA_VISIBLE_DEVICES"] == ""
    assert make_environment("gpu:0,2-3")["CUDA_VISIBLE_DEVICES"] == "0,2,3"


def test_all_gpus_are_taken_or_else_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert find_devices() == f"cpu:{','.join(map(str, sorted(os.sched_getaffinity(0))))}"

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_devices() == "gpu:0,1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,2")
    assert find_devices() == "gpu:2,3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-0a1b,GPU-2c3d")
    with pytest.raises(SettingError, match=r"CUDA_VISIBLE_DEVICES='GPU-0a1b,GPU-2c3d': .* give --devices"):
        find_devices()
