"""A version's tensors on their way out of the learner: as a file, or as a copy in memory."""

import fcntl
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from stages.common.errors import RunError
from stages.learner.weights import collect_trained, collect_weights
from stages.models.load import load_policy, select_trainable
from stages.rl.weights import (
    FilesPublisher,
    ProbeText,
    Publisher,
    TensorsPublisher,
    export_policy,
    make_publisher,
    open_scratch,
)
from tests.tiny import tiny_llama
from tests.toy_models import save_toy_model

PROBE = ProbeText(tuple(range(40, 140)), "fp32", 0.3)


@dataclass(frozen=True)
class Trained:
    """A learner that has only its model."""

    model: PreTrainedModel

    def collect_trained(self) -> dict[str, Tensor]:
        return collect_trained(self.model)


@pytest.fixture
def model() -> PreTrainedModel:
    model = tiny_llama()
    select_trainable(model, 1, "rl.learner.trainable_layers")
    return model


@pytest.fixture(params=["files", "nccl"])
def publisher(request: pytest.FixtureRequest, tmp_path: Path) -> Publisher:
    return make_publisher(request.param, tmp_path / "weights", PROBE)


def test_each_way_has_a_publisher(tmp_path: Path) -> None:
    kinds = [type(make_publisher(publish, tmp_path, PROBE)) for publish in ("files", "nccl", "ipc")]

    assert kinds == [FilesPublisher, TensorsPublisher, TensorsPublisher]


def test_what_is_trained_is_published_in_the_order_of_the_layers(model: PreTrainedModel, publisher: Publisher) -> None:
    update = publisher.write(Trained(model), 3)

    tensors = update.tensors if update.path is None else load_file(update.path)
    assert tensors is not None
    expected = {name: item for name, item in model.named_parameters() if item.requires_grad}
    assert set(tensors) == set(expected)
    assert all(torch.equal(tensors[name], expected[name].to(torch.bfloat16)) for name in expected)
    # 7 matrices and 2 norms of one layer, and the last norm; a file has a header besides.
    assert len(tensors) == 10
    size = sum(2 * item.numel() for item in expected.values())
    assert size <= publisher.num_bytes < size + 4096
    assert (update.policy_version, update.is_temporary) == (3, update.path is not None)


def test_in_shared_memory_a_file_is_used_again_once_no_generator_needs_it(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.rl.weights.SHARED_MEMORY", tmp_path)
    publisher = FilesPublisher(tmp_path / "weights", PROBE)

    def publish(version: int) -> tuple[Path, dict[str, Tensor]]:
        with torch.no_grad():
            for item in model.parameters():
                item.add_(1.0)
        path = publisher.write(Trained(model), version).path
        assert path is not None
        return path, collect_trained(model)

    first, _ = publish(1)
    used = first.stat().st_ino
    second, said_second = publish(2)
    first.unlink()
    third, said_third = publish(3)
    fourth, said_fourth = publish(4)

    assert third.stat().st_ino == used
    assert len({path.stat().st_ino for path in (second, third, fourth)}) == 3
    for path, said in ((second, said_second), (third, said_third), (fourth, said_fourth)):
        read = load_file(path)
        assert read.keys() == said.keys()
        assert all(torch.equal(read[name], said[name]) for name in said)


def test_the_probe_reads_what_is_never_trained_once_and_says_the_same(model: PreTrainedModel) -> None:
    probe = ProbeText(tuple(range(40, 140)), "fp32", 0.3, trunk_depth=1)
    lower, upper = model.model.layers
    calls: list[object] = []
    lower.mlp.register_forward_hook(lambda *_: calls.append(None))

    said = []
    for _ in range(2):
        said.append(probe.compute(model))
        num_calls = len(calls)
        assert said[-1] == PROBE.compute(model)
        calls.clear()
        with torch.no_grad():
            upper.mlp.down_proj.weight.mul_(2.0)

    assert num_calls == 0
    assert said[0] != said[1]


def test_a_copy_in_memory_stays_as_it_was(model: PreTrainedModel) -> None:
    model.to(torch.bfloat16)  # so that there is nothing to convert
    before = {name: item.detach().clone() for name, item in model.named_parameters() if item.requires_grad}

    update = TensorsPublisher(PROBE).write(Trained(model), 1)
    with torch.no_grad():
        for item in model.parameters():
            item.add_(1.0)

    assert update.tensors is not None
    assert list(update.tensors) == list(before)
    assert all(torch.equal(update.tensors[name], before[name]) for name in before)


def test_the_probe_is_the_first_of_the_text(model: PreTrainedModel, publisher: Publisher) -> None:
    probe = publisher.write(Trained(model), 1).probe

    assert probe is not None
    assert probe.token_ids == tuple(range(40, 72))
    assert len(probe.logprobs) == 31
    assert all(value < 0 for value in probe.logprobs)
    assert probe.max_gap == 0.3


def test_a_tied_weight_is_published_once() -> None:
    names = list(collect_trained(tiny_llama()))

    assert names[0] == "model.embed_tokens.weight"
    assert "lm_head.weight" not in names


@pytest.mark.parametrize(("name", "head"), [("EleutherAI/pythia-410m", "embed_out"), ("openai-community/gpt2", None)])
def test_an_exported_policy_has_the_names_that_its_library_stores(tmp_path: Path, name: str, head: str | None) -> None:
    template = save_toy_model(name, tmp_path / "sft")
    model = load_policy(template, torch.float32)

    export_policy(lambda: collect_weights(model), template, 3, tmp_path / "policy")

    exported, stored = (load_file(tmp_path / place / "model.safetensors") for place in ("policy", "sft"))
    assert exported.keys() == stored.keys()
    assert [key for key in exported if head and key.startswith(head)] == ([f"{head}.weight"] if head else [])
    assert all(torch.equal(weight, stored[key].bfloat16()) for key, weight in exported.items())


def test_what_killed_runs_left_is_removed_and_what_a_hidden_run_holds_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.rl.weights.SHARED_MEMORY", tmp_path)
    no_pid = 2**22 + 1  # above the largest one of Linux: as of another container
    left, held = tmp_path / f"slipstream-{no_pid}-a", tmp_path / f"slipstream-{no_pid}-b"
    for directory in (left, held):
        directory.mkdir()
    with (held / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with open_scratch(None, tmp_path, 0) as scratch:
            assert set(tmp_path.iterdir()) == {held, scratch}
    assert set(tmp_path.iterdir()) == {held}


def test_shared_memory_that_is_too_small_for_the_weights_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, disk = tmp_path / "shared", tmp_path / "disk"
    shared.mkdir()
    monkeypatch.setattr("stages.rl.weights.SHARED_MEMORY", shared)
    free = shutil.disk_usage(shared).free

    with open_scratch(None, disk, free // 10) as roomy, open_scratch(None, disk, free) as tight:
        assert (roomy.parent, tight.parent) == (shared, disk)


def test_weights_that_cannot_be_published_name_the_directory_and_the_setting(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    publisher = FilesPublisher(tmp_path / "weights", PROBE)
    (tmp_path / "weights").rmdir()

    with pytest.raises(RunError, match=r"weights: weights of [\d,]+ bytes .*rl.generator.weights_dir"):
        publisher.write(Trained(model), 1)
