"""One update of one model: micro-batches in, DeepSpeed step, merged metrics out."""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch import distributed as dist
from transformers import PreTrainedModel

from stages.common.errors import InputError, NonFiniteLossError
from stages.common.metrics import Mean, merge_means
from stages.learner.config import LearnerConfig
from stages.learner.group import join_alone
from stages.learner.layout import NATIVE, UNIVERSAL, prepare_load, write_layout
from stages.learner.lora import has_adapters
from stages.learner.schedule import compute_lr
from stages.learner.weights import collect_trained, collect_weights
from stages.models.load import move, select_device
from stages.models.sharding import call_as_forward, is_shared_out

logger = logging.getLogger(__name__)

WHOLE_BELOW = 100_000
"""Numbers in a weight that ZeRO-3 leaves whole on every rank, such as a norm's: sending it would take longer."""
BUCKET = 20_000_000
"""Numbers of a gradient that ZeRO-3 gathers before it reduces them; larger ones go by themselves."""
BatchT = TypeVar("BatchT")
LossFunction = Callable[[PreTrainedModel, BatchT], tuple[Tensor, dict[str, Mean]]]
"""Micro-batch -> (its share of the batch's loss, metrics). Shares add up: no division by their number."""


class Learner:
    """A model under training on this rank, and everything an exact resume needs of it.

    With several ranks each has one, and each calls the same methods; see `Ranks` for who sees to that.

    Args:
        model: float32 weights; parameters that do not require gradients stay as they are.
        config: learning rate, clipping, precision, ZeRO stage.
        total_updates: length of the run, which shapes the learning rate.
        rescue_dir: where the batch of a failed update is saved.
    """

    def __init__(self, model: PreTrainedModel, config: LearnerConfig, total_updates: int, rescue_dir: Path) -> None:
        self._config = config
        self._total_updates = total_updates
        self._updates = 0
        self._rescue_dir = rescue_dir
        # On a CPU the fused step is much faster and makes no temporaries.
        fused = True if select_device().type == "cpu" or config.offload_optimizer == "cpu" else None
        optimizer = torch.optim.AdamW(_parameter_groups(model, config.weight_decay), lr=config.lr, fused=fused)
        self._clip = _Clip(optimizer, config.max_grad_norm) if config.stage == 0 else None
        self._engine = _start_engine(model, optimizer, config)

    @property
    def updates(self) -> int:
        """Updates made so far."""
        return self._updates

    @property
    def model(self) -> PreTrainedModel:
        """The model being trained."""
        model: PreTrainedModel = self._engine.module
        return model

    @property
    def holds_plain_weights(self) -> bool:
        """Whether `model` is what is to be exported as it is: whole, without adapters."""
        return not (has_adapters(self.model) or is_shared_out(self.model))

    def autocast(self) -> torch.autocast:
        """The compute type of forward passes."""
        return compute_type(self._config.dtype, next(self.model.parameters()).device.type)

    def update(
        self, micro_batches: Sequence[BatchT], loss_function: LossFunction[BatchT], num_padding: int = 0
    ) -> dict[str, Mean]:
        """One optimizer update over micro-batches whose losses add up to the batch's.

        Args:
            micro_batches: this rank's, as many as every other's.
            loss_function: of the batch over all ranks.
            num_padding: how many at the end are there for their number alone, and count nothing.

        Raises:
            NonFiniteLossError: a loss or the gradient norm is not finite or the norm exceeds
                `stop_grad_norm`, on whatever rank. The micro-batches are saved first.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = compute_lr(self._config, self._updates, self._total_updates)
        num_real = len(micro_batches) - num_padding
        share = 1 / max(num_real, 1)
        parts = [
            self._accumulate(micro_batch, loss_function, share if number < num_real else 0.0)
            for number, micro_batch in enumerate(micro_batches)
        ]
        self._engine.step()
        grad_norm = float(self._clip.norm if self._clip else self._engine.get_global_grad_norm())
        if not grad_norm <= self._config.stop_grad_norm:  # also true for NaN
            self._fail(
                f"gradient norm {grad_norm:.4g} exceeds learner.stop_grad_norm={self._config.stop_grad_norm:.4g}",
                micro_batches,
            )
        metrics = merge_means(parts[:num_real])
        metrics["learner/grad_norm"] = Mean(grad_norm, 1)
        metrics["learner/lr"] = Mean(compute_lr(self._config, self._updates, self._total_updates), 1)
        self._updates += 1
        return metrics

    def _accumulate(self, micro_batch: BatchT, loss_function: LossFunction[BatchT], share: float) -> dict[str, Mean]:
        if self._config.stage == 3:
            # Its gradients start anew with each backward pass unless the engine hears of a forward pass in between.
            self._engine.optimizer.clear_backward_seen_flag()
        with self.autocast():
            loss, metrics = call_as_forward(self.model, loss_function, micro_batch)
        self._require_finite(loss.detach(), micro_batch)
        # DeepSpeed averages gradients over ranks; shares of a global sum must not be averaged.
        weight = self._engine.world_size if share else 0
        self._engine.backward(loss * weight, scale_wrt_gas=False)
        # Losses add up to the batch's, so the counts of all micro-batches add up to one.
        return metrics | {"learner/loss": Mean(loss.detach(), share)}

    def _require_finite(self, loss: Tensor, micro_batch: BatchT) -> None:
        """All ranks stop together: one that stopped alone would leave the others waiting."""
        losses = loss.new_zeros(self._engine.world_size)
        losses[self._engine.global_rank] = loss
        if self._engine.world_size > 1:
            dist.all_reduce(losses)
        for rank, value in enumerate(losses.tolist()):
            if not math.isfinite(value):
                where = f" on rank {rank}" if self._engine.world_size > 1 else ""
                self._fail(f"loss is {value}{where}", [micro_batch], culprit=rank)

    def _fail(self, reason: str, micro_batches: Sequence[Any], culprit: int | None = None) -> None:
        """Save what the update was made of, on the rank whose fault it is or on all, and stop."""
        own = self._engine.global_rank
        if culprit in (None, own):
            self._rescue_dir.mkdir(parents=True, exist_ok=True)
            save_file(dict(_tensors(micro_batches)), self._rescue_path(own))
        if self._engine.world_size > 1:
            dist.barrier()  # who stops first ends the others
        path = self._rescue_path(culprit or 0)
        raise NonFiniteLossError(
            f"update {self._updates + 1}: {reason}; its batch is in {path}; lower learner.lr={self._config.lr:g}"
        )

    def _rescue_path(self, rank: int) -> Path:
        suffix = f"_rank{rank}" if rank else ""
        return self._rescue_dir / f"failed_update_{self._updates + 1}{suffix}.safetensors"

    def collect_weights(self) -> dict[str, Tensor]:
        """Every weight of the model, whole and in bf16, as a plain model has them."""
        return collect_weights(self.model)

    def collect_trained(self) -> dict[str, Tensor]:
        """Those that training changes."""
        return collect_trained(self.model)

    def save(self, directory: Path) -> None:
        """Weights under training, optimizer state and update count, into an existing directory."""
        if self._engine.global_rank == 0:
            write_layout(directory, self._config)
        # DeepSpeed leaves frozen weights out under one name only, and a tied one has two.
        hook = self.model.register_state_dict_post_hook(_drop_frozen)
        try:
            self._engine.save_checkpoint(
                str(directory),
                tag=NATIVE,
                client_state={"updates": self._updates},
                exclude_frozen_parameters=True,
            )
        finally:
            hook.remove()

    def load(self, directory: Path) -> None:
        """Continue exactly where `save` was called; after another number of ranks, but for rounding.

        Raises:
            InputError: the directory holds no checkpoint of this learner.
            RunError: it cannot be converted for this number of ranks.
        """
        self.load_as(prepare_load(directory, self._config), directory)

    def load_as(self, tag: str, directory: Path) -> None:
        """Load what `prepare_load` has made ready; every rank calls it."""
        # A setting of the engine, but one that is known only now.
        self._engine._config.load_universal_checkpoint = tag == UNIVERSAL
        groups = self._engine.optimizer.param_groups
        decays = [group["weight_decay"] for group in groups]
        path, state = self._engine.load_checkpoint(str(directory), tag=tag, load_module_strict=False)
        if path is None:
            raise InputError(f"{directory}: holds no learner checkpoint")
        if tag == UNIVERSAL:
            # It gives every group the first one's settings, and with ZeRO-3 all of them one count of steps, which
            # each then raises.
            for group, decay in zip(groups, decays, strict=True):
                group["weight_decay"] = decay
            for values in self._engine.optimizer.optimizer.state.values():
                values["step"] = values["step"].clone()
        self._updates = int(state["updates"])


def compute_type(dtype: str, device: str) -> torch.autocast:
    """Autocast to bf16, or none for float32."""
    return torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == "bf16")


class _Clip:
    """Clips by itself and keeps the norm, which DeepSpeed does not tell where nothing is shared out.

    An optimizer's step begins when the gradients of all ranks have been averaged.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, max_norm: float) -> None:
        self._max_norm = max_norm
        self.norm: Tensor | float = 0.0
        """Of the last update's gradient, unclipped."""
        optimizer.register_step_pre_hook(self._clip)

    def _clip(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.norm = torch.nn.utils.clip_grad_norm_(parameters, self._max_norm)


def _start_engine(model: PreTrainedModel, optimizer: torch.optim.Optimizer, config: LearnerConfig) -> Any:
    import deepspeed

    join_alone()
    zero: dict[str, Any] = {"stage": config.stage, "stage3_param_persistence_threshold": WHOLE_BELOW}
    if config.stage == 3:
        # Its buffer is held from update to update, at the default size 2 GB.
        zero["reduce_bucket_size"] = BUCKET
    if config.offload_optimizer == "cpu":
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.offload_parameters == "cpu":
        zero["offload_param"] = {"device": "cpu"}
    settings = {
        # The batch is ours: micro-batches vary in size, we say when an update is complete.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.max_grad_norm if config.stage else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # DeepSpeed's own Adam for the CPU would have to be built first, with a compiler.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    engine, *_ = deepspeed.initialize(model=move(model, select_device()), optimizer=optimizer, config=settings)
    if engine.world_size == 1 and config.stage == 0:
        # Else all gradients are copied into one tensor and back, to be averaged with nobody's.
        engine.enable_backward_allreduce = False
    return engine


def _drop_frozen(model: torch.nn.Module, state: dict[str, Any], prefix: str, _: object) -> None:
    for name, parameter in model.named_parameters(prefix.rstrip("."), remove_duplicate=False):
        if not parameter.requires_grad:
            state.pop(name, None)


def _parameter_groups(model: PreTrainedModel, weight_decay: float) -> list[dict[str, Any]]:
    """Decay matrices, leave norms and biases alone."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim > 1]
    vectors = [parameter for parameter in trained if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _tensors(micro_batches: Sequence[Any]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the micro-batches, named by its place, for `save_file`."""
    for number, micro_batch in enumerate(micro_batches):
        stack: list[tuple[str, Any]] = [(str(number), micro_batch)]
        while stack:
            name, value = stack.pop()
            if isinstance(value, Tensor):
                # A copy: two places may hold one tensor, which safetensors refuses.
                yield name, value.detach().cpu().contiguous().clone()
            elif dataclasses.is_dataclass(value):
                stack += [(f"{name}.{field.name}", getattr(value, field.name)) for field in dataclasses.fields(value)]
