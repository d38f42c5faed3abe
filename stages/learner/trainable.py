"""Models as a learner trains them, from a model directory; every rank makes its own in the same way."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stages.learner.config import LearnerConfig
from stages.learner.engine import Learner
from stages.learner.logprobs import require_plain_head
from stages.learner.lora import add_adapters
from stages.learner.trunk import count_trunk
from stages.models.load import find_blocks, load_policy, move, save_model, select_trainable
from stages.models.reward_model import init_reward_model, load_reward_model
from stages.models.shared_prompts import can_share_prompts


def load_trained_policy(path: Path, config: LearnerConfig, setting: str) -> PreTrainedModel:
    """A causal language model in float32, with what is trained marked.

    Args:
        path: model directory.
        config: which layers are trained, or their adapters.
        setting: path of these settings, such as `rl.learner`.

    Raises:
        SettingError: layers that are not there.
        InputError: no model that can be trained.
    """
    model = load_policy(path, torch.float32)
    require_plain_head(model)
    _make_trainable(model, config, setting)
    return model


def load_trained_reward(path: Path, config: LearnerConfig, setting: str, head_seed: int | None) -> PreTrainedModel:
    """A reward model in float32, its head trained in any case; with a seed one with a fresh head on an SFT model.

    Raises:
        SettingError: layers that are not there.
        InputError: no reward model.
    """
    if head_seed is None:
        model = load_reward_model(path, torch.float32)
    else:
        model = init_reward_model(path, torch.float32, head_seed)
    _make_trainable(model, config, setting)
    model.score.requires_grad_(True)
    return model


def shares_prompts(config: LearnerConfig, *models: PreTrainedModel) -> bool:
    """Whether a prompt is read once for its completions: the settings allow it and every model can do it."""
    is_wanted = config.share_prompts == "auto" and not (config.compile or config.gradient_checkpointing)
    return is_wanted and all(can_share_prompts(model) for model in models)


def count_shared_blocks(config: LearnerConfig, *models: PreTrainedModel) -> int:
    """How many blocks need to be computed only once for a batch that all these models read; see trunk.py.

    None where blocks are shared out, compiled, or computed again for gradients; nor with several ranks, among which
    the states would have to travel.
    """
    is_plain = config.num_ranks == 1 and config.stage < 3 and not (config.compile or config.gradient_checkpointing)
    return count_trunk(*models) if is_plain else 0


def save_trained(
    learner: Learner, make_plain: Callable[[], PreTrainedModel], tokenizer: PreTrainedTokenizerBase, path: Path
) -> None:
    """Write the trained model in bf16 as a plain model directory.

    Args:
        learner: is done training.
        make_plain: gives a model of the same kind without adapters.
        tokenizer: is saved beside it.
        path: is filled.
    """
    if learner.holds_plain_weights:
        model = move(learner.model, torch.bfloat16)
    else:
        model = move(make_plain(), torch.bfloat16)
        model.config = learner.model.config
        # A tied weight comes under one of its names, so some may be missing.
        unknown = model.load_state_dict(learner.collect_weights(), strict=False).unexpected_keys
        assert not unknown, unknown
    save_model(model, tokenizer, path)


def _make_trainable(model: PreTrainedModel, config: LearnerConfig, setting: str) -> None:
    if config.lora is None:
        select_trainable(model, config.trainable_layers, f"{setting}.trainable_layers")
    else:
        add_adapters(model, config.lora, config.trainable_layers, setting)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        # The library recomputes in training mode only. The blocks alone are put into it, not what is inside them:
        # dropout stays off.
        for block in find_blocks(model):
            block.training = True
            _drop_nothing(block)
    if config.compile:
        for block in find_blocks(model):
            block.compile(dynamic=True)


def _drop_nothing(block: nn.Module) -> None:
    """OPT's blocks draw dropout themselves, by a number of theirs, and not by a module that is in evaluation mode."""
    for name, value in list(vars(block).items()):
        if "dropout" in name and isinstance(value, float):
            setattr(block, name, 0.0)
