import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from stages.data.batches import SequenceBatch, collate
from stages.data.text import TokenSequence
from stages.learner import trunk
from stages.learner.config import LearnerConfig, LoraConfig
from stages.learner.engine import compute_type
from stages.learner.logprobs import compute_logprobs
from stages.learner.lora import add_adapters
from stages.learner.trainable import count_shared_blocks
from stages.learner.trunk import count_trunk, read_trunks
from stages.models.load import find_blocks, freeze, list_linear, select_trainable
from stages.models.shared_prompts import ARCHITECTURES
from tests.tiny import tiny_llama, tiny_model

LAYERS, DEPTH = 4, 2
PROMPTS = ((3, 4, 5, 6, 7), (8, 9), (10, 11, 12))
SEQUENCES = [
    TokenSequence(PROMPTS[prompt], completion)
    for prompt, completion in [(0, (1, 2, 3)), (1, (4,)), (0, (5, 6, 7, 8)), (2, (9, 10)), (1, (11, 12, 13))]
]


def make_policy(architecture: str = "llama") -> PreTrainedModel:
    """The upper two of four blocks are trained, and are no longer the reference's."""
    model = tiny_model(architecture, LAYERS)
    select_trainable(model, LAYERS - DEPTH, "rl.learner.trainable_layers")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape)
    return model


def make_reference(architecture: str = "llama") -> PreTrainedModel:
    """Its linear layers lie in bf16, as `load_frozen` leaves them."""
    model = tiny_model(architecture, LAYERS)
    freeze(model)
    for layer in list_linear(model):
        layer.to(torch.bfloat16)
    return model


def compute(model: PreTrainedModel, batch: SequenceBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities, and the gradient of a sum that weighs each differently."""
    model.zero_grad()
    with compute_type("bf16", "cpu"):
        logprobs = compute_logprobs(model, batch, temperature=0.7)
    if logprobs.requires_grad:
        (logprobs * torch.arange(logprobs.numel()).view(logprobs.shape)).sum().backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    return logprobs.detach(), gradients


def read(model: PreTrainedModel, batch: SequenceBatch) -> SequenceBatch:
    with compute_type("bf16", "cpu"):
        return read_trunks(model, [batch], DEPTH)[0]


@pytest.mark.parametrize("share_prompts", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_model_notices_that_it_begins_behind_the_trunk(architecture: str, share_prompts: bool) -> None:
    policy, reference = make_policy(architecture), make_reference(architecture)
    plain = collate(SEQUENCES, share_prompts=share_prompts)

    batch = read(reference, plain)

    assert count_trunk(policy, reference) == DEPTH
    for model in (policy, reference):
        (expected, expected_gradients), (logprobs, gradients) = compute(model, plain), compute(model, batch)
        assert torch.equal(logprobs, expected)
        assert gradients.keys() == expected_gradients.keys()
        assert all(torch.equal(value, expected_gradients[name]) for name, value in gradients.items())
    assert gradients == {}


def test_blocks_of_the_trunk_are_computed_once_and_the_others_by_each_model() -> None:
    policy, reference, calls = make_policy(), make_reference(), []
    for name, model in (("policy", policy), ("reference", reference)):
        for number, block in enumerate(find_blocks(model)):
            block.self_attn.register_forward_hook(lambda *_, where=(name, number): calls.append(where))

    batch = read(reference, collate(SEQUENCES))
    assert calls == [("reference", 0), ("reference", 1)]

    calls.clear()
    compute(policy, batch)
    compute(reference, batch)
    compute(policy, replace(batch, trunk=None))  # nothing of it stays behind
    upper = [(name, number) for name in ("policy", "reference") for number in (2, 3)]
    assert calls == [*upper, *(("policy", number) for number in range(LAYERS))]


def test_models_share_what_none_trains_and_all_have_alike() -> None:
    policy = make_policy()
    assert count_trunk(policy) == count_trunk(policy, copy.deepcopy(policy), make_reference()) == DEPTH

    other = copy.deepcopy(policy)
    with torch.no_grad():
        find_blocks(other)[1].mlp.up_proj.weight[0, 0] += 1
    assert count_trunk(policy, other) == 1

    with torch.no_grad():
        other.get_input_embeddings().weight[0, 0] += 1
    assert count_trunk(policy, other) == 0
    assert count_trunk(policy, make_policy("gpt2")) == 0
    assert count_trunk(tiny_llama()) == 0  # all of it is trained


def test_layers_without_adapters_belong_to_the_trunk() -> None:
    model = tiny_model("llama", LAYERS)
    add_adapters(model, LoraConfig(rank=4), LAYERS - DEPTH, "rl.learner")

    assert count_trunk(model) == DEPTH


@pytest.mark.parametrize("setting", [{"num_ranks": 2}, {"zero_stage": 3}, {"compile": True}])
def test_where_blocks_are_not_whole_in_one_process_nothing_is_shared(setting: dict[str, object]) -> None:
    plain = LearnerConfig.model_validate({"lr": 1e-4})

    assert count_shared_blocks(plain, make_policy()) == DEPTH
    assert count_shared_blocks(plain.model_copy(update=setting), make_policy()) == 0


def test_states_that_would_take_much_memory_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, bytes_of_token = collate(SEQUENCES), 4 * 32
    monkeypatch.setattr(trunk, "MAX_BYTES", batch.num_computed_tokens * bytes_of_token)
    assert read(make_policy(), batch).trunk is not None

    monkeypatch.setattr(trunk, "MAX_BYTES", batch.num_computed_tokens * bytes_of_token - 1)
    assert read(make_policy(), batch) is batch
