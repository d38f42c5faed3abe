from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from stages.common.errors import NonFiniteLossError
from stages.common.metrics import Mean
from stages.data.batches import SequenceBatch, collate, split_by_tokens
from stages.data.text import TokenSequence
from stages.learner.config import LearnerConfig
from stages.learner.engine import Learner
from stages.learner.logprobs import compute_logprobs
from stages.models.load import select_trainable
from stages.rl.records import LossInputs
from stages.rl.rollouts import MicroBatch
from tests.tiny import tiny_llama

CONFIG = LearnerConfig(lr=1e-2, dtype="fp32", schedule="linear", trainable_layers="all")
SEQUENCES = [TokenSequence((5, 6, 7), tuple(range(20, 20 + n))) for n in (3, 5, 2, 7)]


def negative_logprob(model: PreTrainedModel, batch: SequenceBatch) -> tuple[Tensor, dict[str, Mean]]:
    return -compute_logprobs(model, batch).sum() / len(SEQUENCES), {}


def train(learner: Learner, updates: int, max_tokens: int = 10_000) -> dict[str, Tensor]:
    for _ in range(updates):
        groups = split_by_tokens([len(s) for s in SEQUENCES], max_tokens)
        learner.update([collate([SEQUENCES[i] for i in group]) for group in groups], negative_logprob)
    return {name: p.detach().clone() for name, p in learner.model.named_parameters()}


def test_micro_batches_add_up_to_the_batch(tmp_path: Path) -> None:
    whole = train(Learner(tiny_llama(), CONFIG, 4, tmp_path), updates=2)
    split = train(Learner(tiny_llama(), CONFIG, 4, tmp_path), updates=2, max_tokens=1)  # one sequence each

    for name, value in whole.items():
        torch.testing.assert_close(split[name], value, atol=2e-5, rtol=1e-4)


def test_updates_are_those_of_adamw_with_the_schedules_rates_and_decay_of_matrices(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"weight_decay": 0.1, "max_grad_norm": 1e9})
    model = tiny_llama()
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=0.1)
    for rate in (1e-2, 5e-3):  # linear, of two updates
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        negative_logprob(model, collate(SEQUENCES))[0].backward()
        optimizer.step()

    found = train(Learner(tiny_llama(), config, 2, tmp_path), updates=2)

    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.detach(), atol=2e-6, rtol=1e-5)


def test_a_resumed_run_equals_one_that_never_stopped_bit_for_bit(tmp_path: Path) -> None:
    straight = train(Learner(tiny_llama(), CONFIG, 4, tmp_path), updates=4)
    first = Learner(tiny_llama(), CONFIG, 4, tmp_path)
    train(first, updates=2)
    first.save(tmp_path)

    second = Learner(tiny_llama(seed=1), CONFIG, 4, tmp_path)
    second.load(tmp_path)
    resumed = train(second, updates=2)

    assert second.updates == 4
    for name, value in straight.items():
        assert torch.equal(resumed[name], value), name


def test_only_the_top_layers_and_the_norm_after_them_move(tmp_path: Path) -> None:
    model = tiny_llama()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    select_trainable(model, 1, "sft.learner.trainable_layers")

    after = train(Learner(model, CONFIG, 2, tmp_path), updates=1)

    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if ".layers.1." in name} | {"model.norm.weight"}


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_its_batch(tmp_path: Path) -> None:
    learner = Learner(tiny_llama(), CONFIG, 2, tmp_path)
    batch = collate(SEQUENCES)

    with pytest.raises(NonFiniteLossError, match=r"update 1: loss is nan"):
        learner.update([batch], lambda model, b: (negative_logprob(model, b)[0] * float("nan"), {}))

    saved = load_file(tmp_path / "failed_update_1.safetensors")
    assert torch.equal(saved["0.input_ids"], batch.input_ids)


def test_a_batch_that_holds_a_tensor_twice_is_saved_too(tmp_path: Path) -> None:
    """As in RL, where tokens and loss inputs have one mask."""
    learner = Learner(tiny_llama(), CONFIG, 2, tmp_path)
    batch = collate(SEQUENCES)
    inputs = LossInputs(
        completion_mask=batch.completion_mask,
        groups=torch.zeros(len(SEQUENCES)),
        advantages=torch.zeros(batch.completion_mask.shape),
        sampling_logprobs=torch.zeros(batch.completion_mask.shape),
        reference_logprobs=torch.zeros(batch.completion_mask.shape),
    )

    def lose(model: PreTrainedModel, item: MicroBatch) -> tuple[Tensor, dict[str, Mean]]:
        return negative_logprob(model, item.sequences)[0] * float("nan"), {}

    with pytest.raises(NonFiniteLossError, match=r"update 1: loss is nan"):
        learner.update([MicroBatch(batch, inputs)], lose)

    saved = load_file(tmp_path / "failed_update_1.safetensors")
    assert torch.equal(saved["0.sequences.completion_mask"], saved["0.inputs.completion_mask"])


def test_a_gradient_norm_above_the_limit_stops_the_run(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"stop_grad_norm": 1e-6})
    learner = Learner(tiny_llama(), config, 2, tmp_path)

    with pytest.raises(NonFiniteLossError, match=r"gradient norm .* exceeds learner.stop_grad_norm=1e-06"):
        learner.update([collate(SEQUENCES)], negative_logprob)
