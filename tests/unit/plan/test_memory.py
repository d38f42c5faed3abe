"""The tiny Llama: H 32, I 64, 4 heads of 8 (2 of keys), 2 layers, 259 tokens, tied. A layer has 9,280 parameters:
1,024 + 512 + 512 + 1,024 of attention, 3 x 2,048, two norms of 32; with table (8,288) and last norm all are 26,880."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, PreTrainedModel

from stages.common.errors import SettingError
from stages.generation.config import GenerationConfig
from stages.learner.config import LearnerConfig, LoraConfig
from stages.learner.engine import compute_type
from stages.learner.lora import add_adapters
from stages.plan.activations import count_block, count_ends
from stages.plan.architecture import Architecture, find_known
from stages.plan.memory import count_frozen_model, count_generator, count_trained_model
from stages.plan.shapes import Batch, DType, ModelBytes, Trained, make_batch, make_shared_batch
from tests.tiny import tiny_llama

TINY = Architecture(tiny_llama().config, "tiny")
LORA = LoraConfig(rank=2)
BATCH = Batch(tokens=16, sequence_tokens=16, completion_tokens=8)
MEASURED = json.loads(Path("docs/benchmarks/2026-11-21-memory.json").read_text())["arms"]


def test_parameters_are_those_of_the_model() -> None:
    assert TINY.num_parameters == 26_880
    assert TINY.num_reward_parameters == 26_912  # a head of 32 more; the table is needed all the same
    assert Trained(TINY, 1, "x").num_trained == 9_312  # a layer and the last norm
    assert Trained(TINY, 1, "x", is_reward=True).num_trained == 9_344


def test_more_layers_than_there_are_are_refused() -> None:
    with pytest.raises(SettingError, match=r"rl\.learner\.trainable_layers=3: the model has 2 layers"):
        _ = Trained(TINY, 3, "rl.learner.trainable_layers").num_trained


def count(trained: Trained, batch: Batch, *, is_gpu: bool = False, **settings: Any) -> ModelBytes:
    return count_trained_model(trained, batch, LearnerConfig(lr=1.0, **settings), is_gpu=is_gpu)


def test_a_trained_model_matches_hand_computation() -> None:
    counted = count(Trained(TINY, 1, "x"), BATCH)

    assert counted.weights == 107_520  # 4 x 26,880
    assert counted.optimizer == 74_496  # 8 x 9,312
    assert count(Trained(TINY, 1, "x"), BATCH, zero_stage=2).optimizer == 111_744  # 12 x 9,312
    # A token in the block: norms 512, casts 5 x 64, attention 4 x 64 + 4 heads x 16 x 6, feed-forward 8 x 64 = 1,984.
    # 16 of them; last norm 16 x 256, predictors 8 x 320, logits 8 x 259 x 14, casts 2 x 9,312 and 2 x 8,288.
    assert (counted.gradients, counted.activations) == (37_248, 102_608)
    long = count(Trained(TINY, 1, "x"), Batch(tokens=160, sequence_tokens=16, completion_tokens=8))
    # A token in the block: norms 512, casts 5 x 64, attention 4 x 64 + 4 heads x 16 x 6, feed-forward 8 x 64 = 1,984.
    # Last norm 160 x 256, predictors 8 x 320, logits 8 x 259 x 14, casts 2 x 9,312 of the block, 2 x 8,288 of the head.
    assert long.activations == 160 * 1_984 + 40_960 + 2_560 + 29_008 + 35_200


def test_a_single_micro_batch_finds_no_gradients() -> None:
    several, alone = (Batch(1600, 16, 8, num_micro_batches=num) for num in (2, 1))

    trained = Trained(TINY, "all", "x")

    assert count(trained, several).total - count(trained, alone).total == 107_520  # 4 x 26,880


def test_adapters_match_the_library_and_hand_computation() -> None:
    trained = Trained(TINY, "all", "rl.learner.trainable_layers", lora=LORA)
    model = tiny_llama()
    add_adapters(model, LORA, "all", "rl.learner")

    # 2 x (64 + 48 + 48 + 64 of attention + 3 x 96) of a layer
    assert trained.num_trained == 2_048 == sum(item.numel() for item in model.parameters() if item.requires_grad)
    assert trained.num_parameters == 28_928  # 26,880 + 2,048
    assert Trained(TINY, 1, "x", is_reward=True, lora=LORA).num_trained == 1_056  # 1,024 + 32
    gpt2 = Architecture(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16), "gpt2")
    # Its layers hold weights the other way round: 2 x (8 + 24 and 8 + 8 of attention, twice 8 + 32).
    assert Trained(gpt2, "all", "x", lora=LORA).num_trained == 256
    with pytest.raises(SettingError, match=r"rl\.learner\.lora\.targets='qkv': no such linear layer"):
        _ = Trained(TINY, "all", "rl.learner.trainable_layers", lora=LoraConfig(targets=("qkv",))).num_trained


def test_ranks_share_what_their_stage_shares() -> None:
    trained = Trained(TINY, "all", "x")
    counted = [count(trained, BATCH, num_ranks=4, zero_stage=stage) for stage in (0, 1, 2, 3)]
    held = [(item.weights, item.optimizer) for item in counted]

    assert held[0] == (107_520, 215_040)  # 4 and 8 x 26,880
    assert held[1] == held[2] == (107_520, 80_640)  # 12 x 26,880 / 4
    # Every weight is small here, so each is whole beside its share; gradients' share 26,880, their bucket 107,520.
    assert held[3] == (134_400, 215_040)  # 107,520 + 26,880; 16 x 26,880 / 4 + 4 x 26,880


SMALL = Batch(tokens=256, sequence_tokens=32, completion_tokens=128)
KNOWN = find_known("HuggingFaceTB/SmolLM2-135M")


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_more_ranks_never_need_more(stage: int, dtype: DType) -> None:
    """From two on: a single one needs neither whole weights beside its share nor a copy for the reduction."""
    assert KNOWN is not None
    trained = Trained(KNOWN, "all", "x")
    totals = [count(trained, SMALL, num_ranks=num, zero_stage=stage, dtype=dtype).total for num in (2, 3, 4, 8, 64)]

    assert totals == sorted(totals, reverse=True)
    assert totals[0] > totals[-1] or stage == 0


@pytest.mark.parametrize("num_ranks", [4, 8, 64])
def test_a_higher_stage_holds_no_more_between_updates(num_ranks: int) -> None:
    """Of 7B parameters. Gathered weights and buckets may make it more within an update."""
    known = find_known("meta-llama/Llama-2-7b-hf")
    assert known is not None
    trained = Trained(known, "all", "x")
    held = [count(trained, SMALL, num_ranks=num_ranks, zero_stage=stage) for stage in (0, 1, 2, 3)]

    sums = [item.weights + item.optimizer for item in held]
    assert sums == sorted(sums, reverse=True)
    assert sums[0] > sums[1] > sums[3]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_adapters_and_checkpointing_need_no_more(stage: int, dtype: DType) -> None:
    assert KNOWN is not None
    settings: dict[str, Any] = {"num_ranks": 2, "zero_stage": stage, "dtype": dtype}
    plain, adapted = Trained(KNOWN, "all", "x"), Trained(KNOWN, "all", "x", lora=LoraConfig())
    long = Batch(tokens=4096, sequence_tokens=512, completion_tokens=2048)

    full = count(plain, long, **settings).total
    assert count(adapted, long, **settings).total < full
    assert count(plain, long, **settings, gradient_checkpointing=True).total < full
    assert count(adapted, long, **settings, gradient_checkpointing=True).total < count(adapted, long, **settings).total


def test_what_is_offloaded_leaves_a_gpu_and_not_a_cpu() -> None:
    assert KNOWN is not None
    trained = Trained(KNOWN, "all", "x")
    settings: dict[str, Any] = {"zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"}

    on_gpu, on_cpu = (count(trained, SMALL, is_gpu=is_gpu, num_ranks=2, **settings) for is_gpu in (True, False))

    assert on_gpu.optimizer == 0
    assert on_gpu.host == pytest.approx((16 + 4) / 2 * 134.515e6 + 80e6, rel=1e-4)
    assert on_gpu.weights == pytest.approx(4 * KNOWN.count_below(100_000), rel=1e-4)
    assert on_cpu.host == 0


def test_on_a_gpu_attention_keeps_no_matrix_and_the_bucket_is_whole() -> None:
    batch = Batch(tokens=160, sequence_tokens=16, completion_tokens=8)

    trained = Trained(TINY, 1, "x")
    on_cpu, on_gpu = (count(trained, batch, is_gpu=is_gpu, zero_stage=2) for is_gpu in (False, True))

    assert on_gpu.activations - on_cpu.activations == 2_000_000_000 - 160 * 384
    alone, beside = (count(trained, batch, is_gpu=is_gpu) for is_gpu in (False, True))  # nothing to share, no bucket
    assert beside.activations - alone.activations == -160 * 384


def test_a_frozen_model_has_weights_and_one_block() -> None:
    scores = Batch(tokens=16, sequence_tokens=16, completion_tokens=0)

    assert count_frozen_model(TINY, scores, "bf16", "bf16", is_gpu=False) == ModelBytes(
        weights=53_824, activations=35_840
    )


def test_a_generator_keeps_keys_and_values_of_every_sequence() -> None:
    config = GenerationConfig(max_prompt_tokens=10, max_new_tokens=6, max_num_seqs=3)

    # 3 x 16 tokens, of each 2 x 2 layers x 2 heads x 8 numbers of 2 bytes
    assert count_generator(TINY, config, 1) == ModelBytes(weights=53_760, cache=6_144)
    assert count_generator(TINY, config, 2) == ModelBytes(weights=26_880, cache=3_072)


@pytest.mark.parametrize(
    ("tokens", "rows", "num_units", "expected"),
    [
        (100, 2, 50, Batch(100, 10, 40, 10)),
        (100, 2, 3, Batch(60, 10, 24, 1)),  # the whole update is smaller
        (15, 2, 50, Batch(20, 10, 8, 50)),  # a pair stays together
    ],
)
def test_the_largest_micro_batch(tokens: int, rows: int, num_units: int, expected: Batch) -> None:
    assert make_batch(tokens, rows, 10, 4, num_units) == expected


def test_a_shared_prompt_is_counted_once() -> None:
    # 8 prompts of 6 tokens, each with 4 completions of 4: 22 tokens, of which 4 prompts make 88 of 100.
    batch = make_shared_batch(100, 1, 6, 4, prompts=(8, 4))

    assert (batch.tokens, batch.sequence_tokens, batch.completion_tokens, batch.num_micro_batches) == (88, 10, 64, 2)
    assert batch.attended_tokens == pytest.approx((24 * 6 + 64 * 10) / 88)
    assert batch.kept_keys == pytest.approx((24 + 16 * 10) / 88)  # 16 rows keep their prompt's keys


def test_ranks_cut_micro_batches_until_each_has_one() -> None:
    assert make_batch(100, 1, 10, 4, num_units=8, num_ranks=2) == Batch(40, 10, 16, 1)


@pytest.mark.parametrize("layers", ["all", "12"])
@pytest.mark.parametrize("algorithm", ["ppo", "remax", "rloo", "grpo", "online_dpo"])
def test_the_formulas_are_within_a_tenth_of_what_was_measured(layers: str, algorithm: str) -> None:
    known = find_known("HuggingFaceTB/SmolLM2-135M")
    assert known is not None
    arm: dict[str, Any] = MEASURED[layers][algorithm]
    batches = {"policy": make_batch(2048, 1, 112, 48, 16), "value model": make_batch(2048, 1, 112, 0, 16)}
    counted = {
        name: count(Trained(known, "all" if layers == "all" else 12, "x", batch.is_scoring), batch, zero_stage=2)
        for name, batch in batches.items()
        if name in arm["bytes"]
    }

    for name, model in counted.items():
        measured = arm["bytes"][name]
        assert model.weights == pytest.approx(measured["weights"], rel=0.001)
        assert model.optimizer == pytest.approx(measured["moments"] + measured["copies"], rel=0.001)
    frozen = 4 * known.num_parameters + 2 * known.num_reward_parameters
    state = frozen + sum(model.weights + model.optimizer for model in counted.values())
    peak = state + max(model.gradients + model.activations for model in counted.values())
    assert peak == pytest.approx(max(arm["peak_bytes"].values()), rel=0.1)


SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 160, "num_key_value_heads": 2},
    "gpt_neox": {"intermediate_size": 256},
    "opt": {"ffn_dim": 256, "word_embed_proj_dim": 64},
    "gpt2": {"bos_token_id": 0, "eos_token_id": 0},
}


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("kind", sorted(SHAPES))
def test_activations_are_within_a_tenth_of_what_autograd_saves(kind: str, dtype: DType) -> None:
    sizes = {"vocab_size": 500, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = AutoConfig.for_model(kind, **sizes, **SHAPES[kind])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    batch = Batch(tokens=480, sequence_tokens=48, completion_tokens=0)
    counted = 4 * 480 * count_block(Architecture(config, kind), batch, dtype, is_gpu=False)
    counted += count_ends(Architecture(config, kind), batch, dtype)

    assert counted == pytest.approx(count_saved(model, torch.randint(0, 500, (10, 48)), dtype), rel=0.1)


def count_saved(model: PreTrainedModel, input_ids: Tensor, dtype: DType) -> int:
    """Bytes of what a forward pass keeps and is no parameter, nor one's copy in the compute type."""
    shapes = {shape for item in model.parameters() for shape in (item.shape, item.shape[::-1])}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.shape not in shapes:
            saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    mask = torch.ones_like(input_ids, dtype=torch.bool)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), compute_type(dtype, "cpu"):
        model.base_model(input_ids=input_ids, attention_mask=mask)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
