"""What the recipes' architectures differ in: where blocks and norms lie, kinds of linear layers, dropout, caches."""

from pathlib import Path
from typing import Any

import pytest
import torch

from stages.common.errors import SettingError
from stages.data.batches import SequenceBatch, collate
from stages.data.text import TokenSequence
from stages.learner.config import LearnerConfig
from stages.learner.engine import compute_type
from stages.learner.logprobs import compute_logprobs
from stages.learner.lora import list_adapted, merge
from stages.learner.trainable import load_trained_policy
from stages.models.load import load_frozen, load_policy, require_context, select_trainable
from stages.models.reward_model import compute_scores, init_reward_model
from tests.toy_models import CONTEXT, save_toy_model

NAMES = ["EleutherAI/pythia-410m", "facebook/opt-1.3b", "openai-community/gpt2", "meta-llama/Llama-3.1-8B"]
FINAL_NORMS = ["gpt_neox.final_layer_norm", "model.decoder.final_layer_norm", "transformer.ln_f", "model.norm"]
SEQUENCES = (TokenSequence((5, 6, 7, 8), (20, 21, 22)), TokenSequence((9, 10), (30, 31, 32, 33, 34)))


@pytest.fixture(scope="module", params=NAMES)
def model_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy_model(request.param, tmp_path_factory.mktemp("model"))


def load_trained(path: Path, **settings: Any) -> Any:
    config = LearnerConfig.model_validate({"lr": 0.1, "dtype": "fp32"} | settings)
    return load_trained_policy(path, config, "rl.learner")


def measure_gradient(model: Any, batch: SequenceBatch) -> tuple[float, list[torch.Tensor]]:
    loss = -compute_logprobs(model, batch).sum()
    loss.backward()
    return loss.item(), [parameter.grad for parameter in model.parameters()]


def test_padded_logprobs_are_those_of_the_library_for_each_sequence_alone(model_path: Path) -> None:
    model = load_policy(model_path, torch.float32)

    found = compute_logprobs(model, collate(SEQUENCES))

    for row, sequence in zip(found, SEQUENCES, strict=True):
        logits = model(input_ids=torch.tensor([sequence.prompt_ids + sequence.completion_ids])).logits[0]
        logprobs = logits.log_softmax(-1)[len(sequence.prompt_ids) - 1 : -1]  # a token is predicted one place before it
        expected = logprobs.gather(1, torch.tensor(sequence.completion_ids)[:, None])[:, 0]
        torch.testing.assert_close(row[: len(expected)], expected)


def test_scores_with_a_shared_prompt_are_those_of_whole_sequences(model_path: Path) -> None:
    model = init_reward_model(model_path, torch.float32, seed=1)
    sequences = [TokenSequence(SEQUENCES[0].prompt_ids, ids) for ids in ((20, 21, 22), (30, 31))]
    sequences += SEQUENCES

    shared = compute_scores(model, collate(sequences, share_prompts=True))

    torch.testing.assert_close(shared, compute_scores(model, collate(sequences)))


def test_a_frozen_model_computes_to_the_last_bit_what_float32_weights_give_under_autocast(model_path: Path) -> None:
    batch = collate(SEQUENCES)
    full, frozen = load_policy(model_path, torch.float32), load_frozen(model_path, "bf16")

    with torch.no_grad(), compute_type("bf16", "cpu"):
        expected, found = (compute_logprobs(model, batch) for model in (full, frozen))

    assert torch.equal(found, expected)
    sizes = [parameter.element_size() for parameter in frozen.parameters() if parameter.ndim > 1]
    assert sizes.count(2) > sizes.count(4) > 0


@pytest.mark.parametrize(("name", "norm"), list(zip(NAMES, FINAL_NORMS, strict=True)))
def test_the_final_norm_is_trained_with_the_top_layers(tmp_path: Path, name: str, norm: str) -> None:
    model = load_policy(save_toy_model(name, tmp_path), torch.float32)

    select_trainable(model, 1, "sft.learner.trainable_layers")

    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert f"{norm}.weight" in trained
    assert all(".1." in name or name.startswith(norm) for name in trained)


def test_blocks_that_are_computed_twice_give_the_same_gradient(model_path: Path) -> None:
    batch = collate(SEQUENCES)
    loss, gradient = measure_gradient(load_trained(model_path), batch)

    found, same = measure_gradient(load_trained(model_path, gradient_checkpointing=True), batch)

    assert found == loss
    torch.testing.assert_close(same, gradient)


def test_a_merged_adapter_does_what_the_adapter_did(model_path: Path) -> None:
    adapted, plain = load_trained(model_path, lora={"rank": 4}), load_policy(model_path, torch.float32)
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.constant_(parameter, 0.1)
    layers = list_adapted(adapted)
    assert len(layers) >= 2 * 4  # two blocks, each with at least four linear layers

    plain.load_state_dict({name: merge(layer) for name, layer in layers.items()}, strict=False)

    found, before = (
        compute_logprobs(model, collate(SEQUENCES)) for model in (plain, load_policy(model_path, torch.float32))
    )
    torch.testing.assert_close(found, compute_logprobs(adapted, collate(SEQUENCES)).detach())
    assert not torch.allclose(found, before)


def test_a_sequence_that_the_model_cannot_read_is_refused_by_its_setting(model_path: Path) -> None:
    require_context(model_path, CONTEXT, "sft.max_tokens=999")

    with pytest.raises(
        SettingError, match=rf"sft.max_tokens=999: a sequence of {CONTEXT + 1} tokens; .*{CONTEXT}; lower"
    ):
        require_context(model_path, CONTEXT + 1, "sft.max_tokens=999")
