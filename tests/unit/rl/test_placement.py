import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from stages.common.errors import SettingError
from stages.generation.config import FleetConfig, Publish
from stages.learner.config import LearnerConfig
from stages.models.load import list_devices
from stages.rl.algorithm_config import OnlineDpoConfig
from stages.rl.config import RlConfig
from stages.rl.placement import Placement, check_launched, check_publish, pin_this_process, place, require_reachable

EIGHT = tuple(range(8))


def make(max_staleness: int, learner_devices: str = "auto", **fleet: Any) -> RlConfig:
    return RlConfig(
        algorithm=OnlineDpoConfig(name="online_dpo"),
        learner=LearnerConfig(lr=1e-4),
        num_updates=4,
        prompts_per_update=4,
        updates_per_rollout=2,  # so that 1 is synchronous
        max_staleness=max_staleness,
        learner_devices=learner_devices,
        generator=FleetConfig(**fleet),
    )


@pytest.mark.parametrize(
    ("replicas", "available", "generators", "learner"),
    [
        (1, (0, 1), ("0",), "1"),
        (1, (0, 1, 2), ("0",), "1,2"),
        (1, EIGHT, ("0,1,2,3",), "4,5,6,7"),
        (2, EIGHT, ("0,1", "2,3"), "4,5,6,7"),
        (3, EIGHT, ("0", "1", "2"), "3,4,5,6,7"),  # equal shares of four, so one more is the learner's
        (2, (3, 5, 8, 13), ("3", "5"), "8,13"),  # cores need not begin at 0
        (2, (6,), ("6", "6"), "6"),  # nothing to share out
    ],
)
def test_apart_generators_get_half_and_the_learner_the_rest(
    replicas: int, available: tuple[int, ...], generators: tuple[str, ...], learner: str
) -> None:
    assert place(make(3, replicas=replicas), available) == Placement(generators, learner)


def test_in_turns_everyone_gets_everything() -> None:
    assert place(make(1, replicas=2), (0, 1, 2)) == Placement(("0,1,2", "0,1,2"), "0,1,2")


def test_servers_elsewhere_leave_every_device_to_the_learner() -> None:
    elsewhere: dict[str, Any] = {"replicas": 0, "urls": ("http://10.0.0.7:8000",), "weights_dir": "/weights"}

    assert place(make(1, **elsewhere), (0, 1)) == Placement((), "0,1")
    assert place(make(3, **elsewhere), (0, 1)) == Placement((), "0,1")


@pytest.mark.parametrize(
    ("max_staleness", "learner_devices", "devices", "expected"),
    [
        (3, "auto", ("0-1", "6"), Placement(("0-1", "6"), "2,3,4,5,7")),
        (3, "5,7", ("0-1", "6"), Placement(("0-1", "6"), "5,7")),
        (3, "0-7", "auto", Placement(("0,1", "2,3"), "0-7")),
        (1, "2-3", "auto", Placement(("0,1,2,3,4,5,6,7",) * 2, "2-3")),
        (1, "auto", ("0", "1"), Placement(("0", "1"), "0,1,2,3,4,5,6,7")),
        (3, "auto", ("0-3", "4-7"), Placement(("0-3", "4-7"), "0,1,2,3,4,5,6,7")),  # none is left for it alone
    ],
)
def test_named_devices_are_followed(
    max_staleness: int, learner_devices: str, devices: tuple[str, ...] | str, expected: Placement
) -> None:
    assert place(make(max_staleness, learner_devices, replicas=2, devices=devices), EIGHT) == expected


@pytest.mark.parametrize(
    ("placement", "scoring", "cores"),
    [
        (Placement(("0",), "1"), "0", "0,1"),
        (Placement(("2-3", "4"), "0-1"), "2-3", "0,1,2,3"),
        (Placement((), "0-1"), "0-1", "0,1"),  # servers elsewhere
        (Placement(("0,1",), "0,1"), "0,1", "0,1"),  # in turns
    ],
)
def test_scoring_runs_on_the_cores_of_the_first_server_and_of_the_learner(
    placement: Placement, scoring: str, cores: str
) -> None:
    assert (placement.scoring, placement.scoring_cores) == (scoring, cores)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learner_devices": "2-9"}, "rl.learner_devices='2-9': 8 is not there; available: 0,1,2,3,4,5,6,7"),
        ({"devices": ("0,11",)}, "rl.generator.devices='0,11': 11 is not there; available: 0,1,2,3,4,5,6,7"),
        ({"devices": ("0..3",)}, "rl.generator.devices='0..3': cores '0..3': expected numbers and rising ranges"),
        ({"learner_devices": ""}, "rl.learner_devices='': cores '': expected numbers and rising ranges"),
        (
            {"replicas": 5},
            "rl.generator.replicas=5 are too many for half of 8 devices; name them in rl.generator.devices",
        ),
    ],
)
def test_devices_that_are_not_there_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError) as caught:
        place(make(3, **settings), EIGHT)

    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("max_staleness", "replicas", "each", "available", "generators", "learner"),
    [
        (3, 1, 1, EIGHT, ("0",), "1,2,3,4,5,6,7"),
        (3, 2, 2, EIGHT, ("0,1", "2,3"), "4,5,6,7"),
        (1, 2, 2, EIGHT, ("0,1", "2,3"), "4,5,6,7"),  # in turns too: memory is taken the whole time
        (3, 2, 1, (0, 1), ("0", "1"), "0,1"),
        (1, 1, 1, (0,), ("0",), "0"),
    ],
)
def test_a_server_gets_as_many_gpus_as_its_engine_uses(
    max_staleness: int, replicas: int, each: int, available: tuple[int, ...], generators: tuple[str, ...], learner: str
) -> None:
    assert place(make(max_staleness, replicas=replicas), available, each) == Placement(generators, learner)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"replicas": 5}, "rl.generator.replicas=5 need 2 GPUs each (generation.engine_args), and there are 8; name"),
        ({"devices": ("0-2",)}, "rl.generator.devices='0-2': a server uses 2 GPUs, tensor x pipeline x data parallel"),
        ({"devices": ("0",)}, "rl.generator.devices='0': a server uses 2 GPUs"),
    ],
)
def test_too_few_or_too_many_gpus_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError) as caught:
        place(make(3, **settings), EIGHT, 2)

    assert str(caught.value).startswith(message)


def test_weights_reach_other_gpus_by_nccl_and_the_own_one_by_ipc() -> None:
    require_reachable("nccl", Placement(("0,1", "2,3"), "4"), ())
    require_reachable("nccl", Placement((), "0"), ("http://10.0.0.7:8000",))
    require_reachable("ipc", Placement(("0", "0"), "0-3"), ())  # the learner is on the first of them


@pytest.mark.parametrize(
    ("publish", "placement", "urls", "message"),
    [
        (
            "nccl",
            Placement(("0,1", "2"), "1,3"),
            (),
            "rl.publish='nccl': the learner's GPU 1 is one of the generators'",
        ),
        ("ipc", Placement(("0", "1"), "0"), (), "rl.publish='ipc' needs every server on the learner's GPU 0 alone"),
        ("ipc", Placement(("0,1",), "0"), (), "rl.publish='ipc' needs every server on the learner's GPU 0 alone"),
        (
            "ipc",
            Placement((), "0"),
            ("http://10.0.0.7:8000",),
            "rl.publish='ipc': servers of rl.generator.urls, such as",
        ),
    ],
)
def test_ways_of_publishing_that_lead_nowhere_are_refused(
    publish: Publish, placement: Placement, urls: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SettingError) as caught:
        require_reachable(publish, placement, urls)

    assert str(caught.value).startswith(message)
    assert "'files'" in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("publish", ["nccl", "ipc"])
def test_without_a_gpu_there_are_only_files(publish: Publish) -> None:
    check_publish(make(3), Placement(("0",), "1"))

    with pytest.raises(SettingError, match=f"^rl.publish='{publish}' needs CUDA, .* allowed: 'files'$"):
        check_publish(make(3).model_copy(update={"publish": publish}), Placement(("0",), "1"))


def launch(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    """As a launcher starts a rank, on a machine with GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, value in ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0"} | variables).items():
        monkeypatch.setenv(name, value)


def test_ranks_of_a_launcher_must_be_on_the_learners_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    launch(monkeypatch, LOCAL_WORLD_SIZE="4")

    check_launched("0-3")
    with pytest.raises(SettingError, match=r"^rl.learner_devices: GPU 0 is not among the learner's, 1-4, .* last GPUs"):
        check_launched("1-4")


def test_a_rank_of_an_unknown_launcher_must_at_least_be_on_one_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    launch(monkeypatch, LOCAL_RANK="2")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)

    check_launched("1-3")
    with pytest.raises(SettingError, match="GPU 2 is not among"):
        check_launched("0,1,3")


def test_ranks_that_send_weights_to_another_machine_need_an_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    config = make(3, replicas=0, urls=("http://10.0.0.7:8000",), weights_dir="weights")
    learner = config.learner.model_copy(update={"num_ranks": 2})
    config = config.model_copy(update={"publish": "nccl", "learner": learner})

    with pytest.raises(SettingError, match="set NCCL_SOCKET_IFNAME to the network interface"):
        check_publish(config, Placement((), "0-1"))
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth0")
    check_publish(config, Placement((), "0-1"))


@pytest.fixture
def _restored() -> Iterator[None]:
    cores, num_threads = os.sched_getaffinity(0), torch.get_num_threads()
    yield
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(num_threads)


@pytest.mark.usefixtures("_restored")
@pytest.mark.skipif(torch.cuda.is_available(), reason="with GPUs, those are what is placed")
def test_a_pinned_process_has_only_its_cores_and_a_thread_for_each() -> None:
    last = list_devices()[-1]

    pin_this_process(str(last))

    assert list_devices() == (last,)
    assert torch.get_num_threads() == 1
