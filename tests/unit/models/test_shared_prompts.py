import pytest
import torch
from transformers import PreTrainedModel

from stages.data.batches import collate
from stages.data.text import TokenSequence
from stages.learner.config import LearnerConfig
from stages.learner.logprobs import compute_logprobs
from stages.learner.trainable import shares_prompts
from stages.models.shared_prompts import ARCHITECTURES, can_share_prompts
from tests.tiny import tiny_llama, tiny_model

PROMPTS = ((3, 4, 5, 6, 7), (8, 9), (10, 11, 12))
SEQUENCES = [
    TokenSequence(PROMPTS[prompt], completion)
    for prompt, completion in [(0, (1, 2, 3)), (1, (4,)), (0, (5, 6, 7, 8)), (2, (9, 10)), (1, (11, 12, 13))]
]


def compute(model: PreTrainedModel, *, share_prompts: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probabilities, and the gradient of a sum that weighs each differently."""
    model.zero_grad()
    logprobs = compute_logprobs(model, collate(SEQUENCES, share_prompts=share_prompts), temperature=0.7)
    (logprobs * torch.arange(logprobs.numel()).view(logprobs.shape)).sum().backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    return logprobs.detach(), gradients


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shared_prompts_change_neither_logprobs_nor_gradients(architecture: str) -> None:
    model = tiny_model(architecture).double()
    assert can_share_prompts(model)

    whole, whole_gradients = compute(model, share_prompts=False)
    shared, gradients = compute(model, share_prompts=True)

    assert torch.allclose(shared, whole, rtol=0, atol=1e-5)  # softmax is in float32
    assert gradients.keys() == whole_gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, whole_gradients[name], rtol=1e-4, atol=1e-5), name


def test_a_shared_prompt_is_read_once() -> None:
    batch = collate(SEQUENCES, share_prompts=True)

    # 3 prompts of up to 5 tokens and 5 completions of up to 4, where whole rows are 5 of up to 9.
    assert (batch.num_computed_tokens, collate(SEQUENCES).num_computed_tokens) == (35, 45)


def test_completions_of_one_token_need_the_prompt_alone() -> None:
    sequences = [TokenSequence(PROMPTS[0], (token,)) for token in (1, 2)]
    model = tiny_llama()

    shared = compute_logprobs(model, collate(sequences, share_prompts=True))

    assert torch.allclose(shared, compute_logprobs(model, collate(sequences)), atol=1e-5)


def test_models_that_look_back_a_limited_distance_are_left_alone() -> None:
    assert not can_share_prompts(tiny_model("mistral", sliding_window=8))
    assert not can_share_prompts(tiny_model("qwen2", sliding_window=8, use_sliding_window=True, max_window_layers=0))


def test_gradient_checkpointing_keeps_no_keys_to_share() -> None:
    model = tiny_llama()
    model.gradient_checkpointing_enable()

    assert not can_share_prompts(model)


@pytest.mark.parametrize(
    ("setting", "expected"), [({}, True), ({"share_prompts": "off"}, False), ({"compile": True}, False)]
)
def test_settings_decide_first(setting: dict[str, object], expected: bool) -> None:
    config = LearnerConfig.model_validate({"lr": 1e-4} | setting)

    assert shares_prompts(config, tiny_llama(), tiny_llama()) == expected
