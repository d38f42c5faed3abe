"""One update of one model: micro-batches in, DeepSpeed step, merged metrics out."""

import dataclasses
import functools
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from stages.common.errors import InputError, NonFiniteLossError
from stages.common.metrics import Mean, merge_means
from stages.learner.config import LearnerConfig
from stages.learner.schedule import compute_lr
from stages.models.load import move, select_device

logger = logging.getLogger(__name__)

BatchT = TypeVar("BatchT")
LossFunction = Callable[[PreTrainedModel, BatchT], tuple[Tensor, dict[str, Mean]]]
"""Micro-batch -> (its share of the batch's loss, metrics). Shares add up: no division by their number."""


class Learner:
    """A model under training on this rank, and everything an exact resume needs of it.

    Args:
        model: float32 weights; parameters that do not require gradients stay as they are.
        config: learning rate, clipping, precision, ZeRO stage.
        total_updates: length of the run, which shapes the learning rate.
        rescue_dir: where the batch of a failed update is saved.
    """

    def __init__(self, model: PreTrainedModel, config: LearnerConfig, total_updates: int, rescue_dir: Path) -> None:
        self.config = config
        self.total_updates = total_updates
        self.updates = 0
        self._rescue_dir = rescue_dir
        self._engine = _start_engine(model, config)

    @property
    def model(self) -> PreTrainedModel:
        """The model being trained."""
        model: PreTrainedModel = self._engine.module
        return model

    def autocast(self) -> torch.autocast:
        """The compute type of forward passes."""
        return compute_type(self.config.dtype, next(self.model.parameters()).device.type)

    def update(self, micro_batches: Sequence[BatchT], loss_function: LossFunction[BatchT]) -> dict[str, Mean]:
        """One optimizer update over micro-batches whose losses add up to the batch's.

        Raises:
            NonFiniteLossError: a loss or the gradient norm is not finite or the norm exceeds
                `stop_grad_norm`. The micro-batches are saved first.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = compute_lr(self.config, self.updates, self.total_updates)
        share = 1 / len(micro_batches)
        parts = [self._accumulate(micro_batch, loss_function, share) for micro_batch in micro_batches]
        self._engine.step()
        grad_norm = float(self._engine.get_global_grad_norm())
        if not grad_norm <= self.config.stop_grad_norm:  # also true for NaN
            self._fail(f"gradient norm {grad_norm:.4g} exceeds {self.config.stop_grad_norm:.4g}", micro_batches)
        metrics = merge_means(parts)
        metrics["learner/grad_norm"] = Mean(grad_norm, 1)
        metrics["learner/lr"] = Mean(compute_lr(self.config, self.updates, self.total_updates), 1)
        self.updates += 1
        return metrics

    def _accumulate(self, micro_batch: BatchT, loss_function: LossFunction[BatchT], share: float) -> dict[str, Mean]:
        with self.autocast():
            loss, metrics = loss_function(self.model, micro_batch)
        if not math.isfinite(loss.item()):
            self._fail(f"loss is {loss.item()}", [micro_batch])
        # DeepSpeed averages gradients over ranks; shares of a global sum must not be averaged.
        self._engine.backward(loss * self._engine.world_size, scale_wrt_gas=False)
        # Losses add up to the batch's, so the counts of all micro-batches add up to one.
        return metrics | {"learner/loss": Mean(loss.detach(), share)}

    def _fail(self, reason: str, micro_batches: Sequence[Any]) -> None:
        self._rescue_dir.mkdir(parents=True, exist_ok=True)
        path = self._rescue_dir / f"failed_update_{self.updates + 1}.safetensors"
        save_file(dict(_tensors(micro_batches)), path)
        raise NonFiniteLossError(
            f"update {self.updates + 1}: {reason}; its batch is in {path}; lower the learning rate"
        )

    def save(self, directory: Path) -> None:
        """Weights under training, optimizer state and update count, into an existing directory."""
        self._engine.save_checkpoint(
            str(directory),
            tag="learner",
            client_state={"updates": self.updates},
            exclude_frozen_parameters=True,
        )

    def load(self, directory: Path) -> None:
        """Continue exactly where `save` was called.

        Raises:
            InputError: the directory holds no checkpoint of this learner.
        """
        path, state = self._engine.load_checkpoint(str(directory), tag="learner", load_module_strict=False)
        if path is None:
            raise InputError(f"{directory}: holds no learner checkpoint")
        self.updates = int(state["updates"])


def compute_type(dtype: str, device: str) -> torch.autocast:
    """Autocast to bf16, or none for float32."""
    return torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == "bf16")


def _start_engine(model: PreTrainedModel, config: LearnerConfig) -> Any:
    import deepspeed

    _join_process_group()
    optimizer = torch.optim.AdamW(_parameter_groups(model, config.weight_decay), lr=config.lr)
    settings = {
        # The batch is ours: micro-batches vary in size, we say when an update is complete.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.max_grad_norm,
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }
    engine, *_ = deepspeed.initialize(model=move(model, select_device()), optimizer=optimizer, config=settings)
    return engine


def _parameter_groups(model: PreTrainedModel, weight_decay: float) -> list[dict[str, Any]]:
    """Decay matrices, leave norms and biases alone."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim > 1]
    vectors = [parameter for parameter in trained if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


@functools.cache
def _join_process_group() -> None:
    """Join the launcher's process group, or make one of a single rank."""
    import deepspeed
    import deepspeed.ops
    from torch._C._distributed_c10d import HashStore

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" not in os.environ:
        # DeepSpeed insists on this one. RANK stays unset: child processes would take it for a launcher's.
        os.environ.setdefault("LOCAL_RANK", "0")
        # One rank needs no shared-memory reduction; building it would need a compiler and 20 seconds.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        store = HashStore()  # in this process's memory: a single rank meets nobody
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)


def _tensors(micro_batches: Sequence[Any]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the micro-batches, named by its place, for `save_file`."""
    for number, micro_batch in enumerate(micro_batches):
        stack: list[tuple[str, Any]] = [(str(number), micro_batch)]
        while stack:
            name, value = stack.pop()
            if isinstance(value, Tensor):
                yield name, value.detach().cpu().contiguous()
            elif dataclasses.is_dataclass(value):
                stack += [(f"{name}.{field.name}", getattr(value, field.name)) for field in dataclasses.fields(value)]
