import os
import subprocess
import sys

import pytest
import torch

from flows import worker
from flows.worker import find_devices, make_environment, work
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


def test_a_worker_that_ends_is_started_again_and_chores_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    done: set[str] = set()

    def start_worker(pool: str, name: str | None) -> "subprocess.Popen[bytes]":  # noqa: ARG001  as the worker's own
        program = "import time; time.sleep(60)" if started else ""  # the first one ends at once
        started.append(subprocess.Popen([sys.executable, "-c", program]))
        return started[-1]

    def end_when_all_is_done() -> None:
        done.add("looked")
        if len(started) > 1 and "sent" in done:
            raise KeyboardInterrupt

    monkeypatch.setattr(worker, "start_worker", start_worker)
    monkeypatch.setattr(worker, "look_for_missed", end_when_all_is_done)
    monkeypatch.setattr(worker, "send_left_behind", lambda: done.add("sent"))
    for name in ("RESTART_S", "LOOK_S", "SEND_EVERY_S"):
        monkeypatch.setattr(worker, name, 0.01)

    with pytest.raises(KeyboardInterrupt):
        work(["local"], None, "gpu:0")

    assert len(started) == 2
    assert [item.poll() is None for item in started] == [False, False]
