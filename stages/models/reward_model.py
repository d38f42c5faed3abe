"""A reward model: a language model's backbone with a scalar head, in Hugging Face's own format.

Shapes: B sequences, S tokens, right-padded.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from stages.common.errors import InputError
from stages.models.load import load_model
from stages.models.sharding import call_as_forward

SHIFT = "score_shift"
"""Key in the model's config: subtracted from the head's output, so that SFT samples average 0."""
RANGE = "score_range"
"""Key in the model's config: lowest and highest shifted score seen on SFT samples."""


def init_reward_model(sft: Path, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """The SFT model with a fresh scalar head, standard deviation 1/sqrt(hidden size + 1).

    The head's initialisation is that of Stiennon et al. 2020 (arXiv:2009.01325), drawn from its own generator.
    """
    model = load_model(AutoModelForSequenceClassification, sft, dtype, num_labels=1)
    head = _head(model)
    generator = torch.Generator().manual_seed(seed)
    scale = (head.weight.shape[1] + 1) ** -0.5
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * scale)
    setattr(model.config, SHIFT, 0.0)
    setattr(model.config, RANGE, [0.0, 0.0])
    return model


def load_reward_model(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """A trained reward model, in evaluation mode.

    Raises:
        InputError: `path` holds no reward model with one output.
    """
    model = load_model(AutoModelForSequenceClassification, path, dtype)
    if model.config.num_labels != 1:
        raise InputError(f"{path}: has {model.config.num_labels} outputs; a reward model has one")
    return model


def compute_scores(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Score of each sequence, read at its last real token (the end-of-sequence token if it is there).

    The library's own pooling looks for the last token that is not padding *by value* and so would skip an
    end-of-sequence token that doubles as padding; here the position comes from the mask.

    Args:
        model: from `init_reward_model` or `load_reward_model`.
        input_ids: prompt and completion. [B, S]
        attention_mask: True on real tokens, which come first. [B, S]

    Returns:
        Shifted scores in float32. [B]
    """
    outputs = model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    hidden = outputs.last_hidden_state  # [B, S, H]
    return _read_scores(model, hidden, attention_mask)


def compute_shared_scores(
    model: PreTrainedModel, prompt_ids: Tensor, input_ids: Tensor, attention_mask: Tensor
) -> Tensor:
    """Scores of completions of one prompt, which is read once: half the work where prompts are as long as completions.

    Args:
        model: from `init_reward_model` or `load_reward_model`.
        prompt_ids: [P]
        input_ids: the completions alone. [B, T]
        attention_mask: True on their real tokens, which come first. [B, T]

    Returns:
        Shifted scores in float32, those of `compute_scores` but for rounding. [B]
    """
    num_rows, num_tokens = input_ids.shape
    cache = model.base_model(input_ids=prompt_ids[None], use_cache=True).past_key_values
    cache.batch_repeat_interleave(num_rows)
    prompt_mask = attention_mask.new_ones(num_rows, len(prompt_ids))
    positions = torch.arange(len(prompt_ids), len(prompt_ids) + num_tokens, device=input_ids.device)
    hidden = model.base_model(
        input_ids=input_ids,
        attention_mask=torch.cat([prompt_mask, attention_mask], dim=1),
        position_ids=positions.expand(num_rows, num_tokens),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state  # [B, T, H]
    return _read_scores(model, hidden, attention_mask)


def apply_head(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Shifted score read from each hidden state, in float32. [N, H] -> [N]"""
    return call_as_forward(_head(model), _read_head, hidden) - float(getattr(model.config, SHIFT, 0.0))


def _read_head(head: nn.Linear, hidden: Tensor) -> Tensor:
    # The head is tiny and its output is compared across batches: always in float32.
    with torch.autocast(hidden.device.type, enabled=False):
        return nn.functional.linear(hidden.float(), head.weight.float()).squeeze(1)


def _read_scores(model: PreTrainedModel, hidden: Tensor, attention_mask: Tensor) -> Tensor:
    last = attention_mask.long().sum(dim=1) - 1  # [B]
    rows = torch.arange(len(last), device=last.device)
    return apply_head(model, hidden[rows, last])


def _head(model: PreTrainedModel) -> nn.Linear:
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise InputError(f"{type(model).__name__} has no linear head named 'score' with one output")
    return head
