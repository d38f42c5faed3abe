"""A reward model: a language model's backbone with a scalar head, in Hugging Face's own format.

Shapes: B sequences, S tokens of prompt and completion, T of the completion, right-padded.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from stages.common.errors import InputError
from stages.data.batches import SequenceBatch
from stages.models.load import load_model
from stages.models.sharding import call_as_forward
from stages.models.shared_prompts import read_shared

SHIFT = "score_shift"
"""Key in the model's config: subtracted from the head's output, so that SFT samples average 0."""
RANGE = "score_range"
"""Key in the model's config: lowest and highest shifted score seen on SFT samples."""


def init_reward_model(sft: Path, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """The SFT model with a fresh scalar head, standard deviation 1/sqrt(hidden size + 1).

    The head's initialisation is that of Stiennon et al. 2020 (arXiv:2009.01325), drawn from its own generator.
    """
    model = load_model(AutoModelForSequenceClassification, sft, dtype, fresh=frozenset({"score.weight"}), num_labels=1)
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


def compute_scores(model: PreTrainedModel, batch: SequenceBatch) -> Tensor:
    """Score of each completion, read at its last token (the end-of-sequence token if it is there).

    The library's own pooling looks for the last token that is not padding *by value* and so would skip an
    end-of-sequence token that doubles as padding; here the position comes from the mask.

    Args:
        model: from `init_reward_model` or `load_reward_model`.
        batch: prompts and completions; with shared prompts if `can_share_prompts` of the model.

    Returns:
        Shifted scores in float32. [B]
    """
    if batch.prompts is None:
        outputs = model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        hidden = outputs.last_hidden_state  # [B, S, H]
        last = batch.attention_mask.sum(dim=1) - 1  # [B]
    else:
        hidden = read_shared(model, batch, with_last=True)  # [B, T + 1, H]
        last = batch.completion_mask.sum(dim=1)  # [B]
    rows = torch.arange(len(last), device=last.device)
    return apply_head(model, hidden[rows, last])


def apply_head(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Shifted score read from each hidden state, in float32. [N, H] -> [N]"""
    return call_as_forward(_head(model), _read_head, hidden) - float(getattr(model.config, SHIFT, 0.0))


def _read_head(head: nn.Linear, hidden: Tensor) -> Tensor:
    # The head is tiny and its output is compared across batches: always in float32.
    with torch.autocast(hidden.device.type, enabled=False):
        return nn.functional.linear(hidden.float(), head.weight.float()).squeeze(1)


def _head(model: PreTrainedModel) -> nn.Linear:
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise InputError(f"{type(model).__name__} has no linear head named 'score' with one output")
    return head
