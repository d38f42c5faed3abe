"""A model that only computes beside one under training: RL's reference, whole on each rank or shared out (ZeRO-3)."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from stages.learner import engine
from stages.learner.config import LearnerConfig
from stages.learner.group import join_alone
from stages.models.load import freeze, load_frozen, load_policy, move, select_device


def load_frozen_policy(path: Path, config: LearnerConfig) -> PreTrainedModel:
    """The SFT model as a reference; its weights lie where those of the model under training lie.

    Args:
        path: model directory.
        config: of the learner; with `zero_stage: 3` every rank calls this, and computes with the model together.
    """
    if config.stage < 3:
        return load_frozen(path, config.dtype)
    model = load_policy(path, torch.float32)
    freeze(model)
    return _share_out(model, config)


def _share_out(model: PreTrainedModel, config: LearnerConfig) -> PreTrainedModel:
    """Without an optimizer, ZeRO-3 is hooks on the modules, which bring weights and let them go again."""
    import deepspeed

    join_alone()
    zero: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": engine.WHOLE_BELOW}
    if config.offload_parameters == "cpu":
        zero["offload_param"] = {"device": "cpu"}
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "steps_per_print": None}
    started, *_ = deepspeed.initialize(model=move(model, select_device()), config=settings)
    shared: PreTrainedModel = started.module
    return shared
