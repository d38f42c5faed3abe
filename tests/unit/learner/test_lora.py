import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from stages.common.errors import SettingError
from stages.data.batches import collate
from stages.data.text import TokenSequence
from stages.generation.vllm_worker import require_whole_layers
from stages.learner.config import LearnerConfig, LoraConfig
from stages.learner.engine import Learner
from stages.learner.logprobs import compute_logprobs, compute_logprobs_and_kl
from stages.learner.lora import adapters_off, add_adapters
from stages.learner.trainable import load_trained_reward, save_trained
from stages.learner.weights import collect_trained, collect_weights
from stages.models.load import load_policy
from tests.tiny import save_tiny_model, tiny_llama, tiny_tokenizer

IDS = torch.tensor([[5, 6, 7, 20, 21]])
BATCH = collate([TokenSequence((5, 6, 7), (20, 21, 22))])


def adapt(layers: Any = "all", **settings: Any) -> PreTrainedModel:
    model = tiny_llama()
    add_adapters(model, LoraConfig.model_validate({"rank": 4} | settings), layers, "sft.learner")
    return model


def disturb(model: PreTrainedModel) -> None:
    """As after some updates: B is no longer zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def test_before_the_first_update_the_model_computes_what_it_did() -> None:
    torch.testing.assert_close(adapt()(IDS).logits, tiny_llama()(IDS).logits, rtol=0, atol=0)


def test_every_rank_and_every_start_draws_the_same_adapters() -> None:
    first, second = (dict(adapt().named_parameters()) for _ in range(2))

    assert all(torch.equal(value, second[name]) for name, value in first.items())
    drawn = first["model.layers.0.self_attn.q_proj.lora_A.default.weight"]
    assert drawn.abs().max() <= 32**-0.5  # uniform within 1/sqrt(inputs), as linear layers begin
    assert drawn.std() > 0.5 * 32**-0.5


def test_merged_weights_are_a_plain_model_that_computes_the_same() -> None:
    model = adapt(alpha=16.0)
    disturb(model)
    plain = LlamaForCausalLM(tiny_llama().config).eval()
    plain.load_state_dict({name: value.float() for name, value in collect_weights(model).items()}, strict=False)

    # Weights are exported in bf16; logits of the random model are near 1.
    torch.testing.assert_close(plain(IDS).logits, model(IDS).logits, rtol=0.02, atol=0.02)
    assert not torch.allclose(plain(IDS).logits, tiny_llama()(IDS).logits, rtol=0.02, atol=0.05)


def test_layers_with_an_adapter_are_published_whole_and_nothing_else_is_trained() -> None:
    model = adapt(layers=1, targets=["q_proj", "down_proj"])

    collected = collect_trained(model)

    # And those beside them, which vLLM packs with them.
    attention = {f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkvo"}
    mlp = {f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    assert set(collected) == attention | mlp
    require_whole_layers(collected, {"qkv_proj": ["q_proj", "k_proj", "v_proj"]})
    base = tiny_llama().state_dict()["model.layers.1.self_attn.k_proj.weight"]
    torch.testing.assert_close(collected["model.layers.1.self_attn.k_proj.weight"], base.to(torch.bfloat16))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 4  # A and B of each
    assert all(".lora_" in name for name in trained)


def test_with_the_adapters_off_it_is_the_model_it_was_and_trains_on_afterwards() -> None:
    model = adapt()
    disturb(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    with adapters_off(model):
        base = model(IDS).logits

    assert torch.equal(base, tiny_llama()(IDS).logits)
    assert not torch.allclose(model(IDS).logits, base)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained


def test_the_exact_kl_to_the_base_is_that_to_a_copy_of_it() -> None:
    model = adapt()
    disturb(model)

    logprobs, kl = compute_logprobs_and_kl(model, None, BATCH, temperature=0.8)
    _, expected = compute_logprobs_and_kl(model, tiny_llama(), BATCH, temperature=0.8)

    assert kl.min() > 0
    torch.testing.assert_close(kl, expected)
    torch.testing.assert_close(logprobs, compute_logprobs(model, BATCH, temperature=0.8))


def test_a_target_that_is_not_there_is_named() -> None:
    message = r"sft.learner.lora.targets='w_pack': no such linear layer; allowed: 'all' or any of down_proj, gate_proj"
    with pytest.raises(SettingError, match=message):
        adapt(targets=["w_pack"])


def test_a_reward_model_trains_its_head_beside_the_adapters_and_is_saved_whole(tmp_path: Path) -> None:
    sft = save_tiny_model(tmp_path / "sft")
    config = LearnerConfig(lr=1e-2, dtype="fp32", lora=LoraConfig(rank=4))
    learner = Learner(load_trained_reward(sft, config, "reward.learner", head_seed=1), config, 2, tmp_path)
    disturb(learner.model)
    head = copy.deepcopy(learner.model.score.weight)

    assert head.requires_grad
    save_trained(
        learner,
        lambda: load_trained_reward(sft, config.model_copy(update={"lora": None}), "reward.learner", head_seed=2),
        tiny_tokenizer(),
        tmp_path / "out",
    )

    saved = load_trained_reward(tmp_path / "out", LearnerConfig(lr=1.0), "reward.learner", head_seed=None)
    torch.testing.assert_close(saved.score.weight, head.bfloat16().float())
    torch.testing.assert_close(
        saved.state_dict()["model.layers.0.mlp.up_proj.weight"],
        collect_weights(learner.model)["model.layers.0.mlp.up_proj.weight"].float(),
    )
    assert load_policy(sft, torch.float32).config.vocab_size == saved.config.vocab_size
