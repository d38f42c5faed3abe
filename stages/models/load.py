"""Loading, freezing and saving causal language models."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from stages.common.errors import InputError, SettingError

logger = logging.getLogger(__name__)

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Endings of the files that `torch.save` wrote."""
LINEAR = (nn.Linear, Conv1D)
"""Kinds of linear layers; GPT-2 has only the second, whose weight is that of the first transposed."""
TrainableLayers = int | Literal["all"]


def quiet_transformers() -> None:
    """Turn off the library's own progress bars and load reports; ours say what a person needs."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def select_device() -> torch.device:
    """This rank's GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def list_devices() -> tuple[int, ...]:
    """GPUs where there are any, else the CPU cores this process may use."""
    if torch.cuda.is_available():
        return tuple(range(torch.cuda.device_count()))
    return tuple(sorted(os.sched_getaffinity(0)))


def attention() -> str:
    """The attention implementation: on CPU the plain one is a fifth faster for the short rows trained here."""
    return "sdpa" if torch.cuda.is_available() else "eager"


def require_model_directory(path: Path) -> None:
    """Refuse a directory that holds no model, naming what is missing.

    Pickled weights count as none: whoever reads them runs the code that is in them.

    Raises:
        InputError: no such directory, no config.json, or no safetensors weights.
    """
    if not path.is_dir():
        raise InputError(f"{path}: no such model directory")
    if not (path / "config.json").is_file():
        raise InputError(f"{path}: holds no config.json, so it is no model directory")
    if any(path.glob("*.safetensors")):
        return
    pickled = sorted(file.name for file in path.iterdir() if file.suffix in PICKLES)
    if pickled:
        raise InputError(
            f"{path}: holds its weights as {pickled[0]} only, a pickle, and reading one runs whatever code is in it; "
            "expected *.safetensors, as save_pretrained writes them where you trust the file enough to load it"
        )
    raise InputError(f"{path}: holds no weights (*.safetensors)")


def load_policy(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """A causal language model, in evaluation mode so that dropout never runs.

    Raises:
        InputError: `path` is no complete model directory.
    """
    return load_model(AutoModelForCausalLM, path, dtype)


def load_frozen(path: Path, dtype: Literal["bf16", "fp32"]) -> PreTrainedModel:
    """A causal language model that only computes, on this process's device: what autocast gives with float32 weights.

    With bf16 its linear layers are kept in bf16, to which autocast would round them in each forward pass anew: the same
    results to the last bit, and half the bytes of these layers. Embeddings and norms stay float32, as is the stream
    that they give.

    Args:
        path: model directory.
        dtype: compute type, under autocast.
    """
    model = load_policy(path, torch.float32)
    freeze(model)
    if dtype == "bf16":
        for layer in list_linear(model):
            layer.to(torch.bfloat16)
    return move(model, select_device())


def list_linear(model: PreTrainedModel) -> list[nn.Module]:
    """Linear layers of the blocks, and the output head if it is not the table of embeddings."""
    inside: Iterator[nn.Module] = (module for block in find_blocks(model) for module in block.modules())
    layers = [module for module in inside if isinstance(module, LINEAR)]
    head = model.get_output_embeddings()
    if head is None or head.weight is model.get_input_embeddings().weight:
        return [*layers]
    return [*layers, head]


def load_model(
    auto_class: Any, path: Path, dtype: torch.dtype, *, fresh: frozenset[str] = frozenset(), **settings: int
) -> PreTrainedModel:
    """A model of one of the library's auto classes: safetensors only, no remote code, evaluation mode.

    Args:
        auto_class: such as `AutoModelForCausalLM`.
        path: model directory.
        dtype: of the weights.
        fresh: names of weights that need not be there, as the caller makes them.
        **settings: of the model's config.

    Raises:
        InputError: `path` is no complete model directory, or lacks weights of this kind of model.
    """
    require_model_directory(path)
    quiet_transformers()
    try:
        model = load_whole(
            auto_class,
            path,
            fresh=fresh,
            dtype=dtype,
            use_safetensors=True,
            attn_implementation=attention(),
            **settings,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{path}: not a readable model: {str(error).splitlines()[0]}") from error
    model.eval()
    return model


def load_whole(
    auto_class: Any, source: Path | str, *, fresh: frozenset[str] = frozenset(), **settings: Any
) -> PreTrainedModel:
    """The library's `from_pretrained` without remote code, and without weights that it makes up silently.

    Args:
        auto_class: such as `AutoModelForCausalLM`.
        source: directory, or name on the hub.
        fresh: names of weights that need not be there.
        **settings: for `from_pretrained`, which raises its own errors.

    Raises:
        InputError: weights are missing; whoever catches it says of what.
    """
    model: PreTrainedModel
    model, report = auto_class.from_pretrained(source, trust_remote_code=False, output_loading_info=True, **settings)
    missing = report["missing_keys"] - fresh
    if missing:
        first, *rest = sorted(missing)
        more = f" and {len(rest)} more" if rest else ""
        raise InputError(
            f"it holds no weight {first!r}{more}, which {type(model).__name__} needs; it was saved by another "
            "kind of model, or not whole"
        )
    return model


def require_context(path: Path, num_tokens: int, setting: str) -> None:
    """Refuse sequences longer than the model was made for: learned positions end there, others give nonsense.

    Args:
        path: model directory.
        num_tokens: of the longest sequence.
        setting: what allows it, such as `sft.max_tokens=2048`.

    Raises:
        InputError: `path` has no readable config.
        SettingError: the model's context is shorter.
    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable config: {str(error).splitlines()[0]}") from error
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and num_tokens > context:
        raise SettingError(f"{setting}: a sequence of {num_tokens} tokens; {path} reads at most {context}; lower it")


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved beside a model.

    Raises:
        InputError: there is none.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable tokenizer: {str(error).splitlines()[0]}") from error
    return tokenizer


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Write safetensors, config, generation config, tokenizer and chat template."""
    path.mkdir(parents=True, exist_ok=True)
    if model.can_generate():  # a reward model has no generation config
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def name_as_stored(weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Weights under the names that model directories have, which for some architectures are not the model's own.

    Args:
        weights: of a causal language model, by its own names.
        path: its directory, of which the config is read.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path, trust_remote_code=False))
    stored: dict[str, Tensor] = revert_weight_conversion(model, weights)
    return stored


def move(model: PreTrainedModel, target: torch.device | torch.dtype | str) -> PreTrainedModel:
    """`model.to`, in place, with a type that survives the library's decorators."""
    nn.Module.to(model, target)
    return model


def freeze(model: nn.Module) -> None:
    """Let no parameter be trained (reference, reward model, and models that only score)."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def select_trainable(model: PreTrainedModel, layers: TrainableLayers, setting: str) -> None:
    """Train all parameters, or only the top `layers` transformer blocks and the norm after them.

    Freezing the lower blocks and the embeddings saves their backward pass and optimizer state: on two
    cores that is the difference between minutes and an hour.

    Args:
        model: a causal language model or one with a scalar head.
        layers: "all", or how many blocks counted from the output.
        setting: path of the setting, for the message.

    Raises:
        SettingError: `layers` is not between 1 and the model's number of blocks.
    """
    blocks = find_blocks(model)
    if layers == "all":
        return
    if not 1 <= layers <= len(blocks):
        raise SettingError(f"{setting}={layers}: the model has {len(blocks)} layers; allowed: 'all' or 1…{len(blocks)}")
    freeze(model)
    for block in blocks[len(blocks) - layers :]:
        block.requires_grad_(True)
    for norm in find_final_norms(model, blocks):
        norm.requires_grad_(True)


def find_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The list of transformer blocks, whatever the architecture calls it."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers:
            return module
    raise InputError(f"{type(model).__name__}: found no list of {model.config.num_hidden_layers} transformer blocks")


def find_final_norms(model: nn.Module, blocks: nn.ModuleList) -> Iterator[nn.Module]:
    """The norm after the last block; it stands beside the list of blocks, which OPT has a module deeper than others."""
    for module in model.modules():
        if not any(child is blocks for child in module.children()):
            continue
        for name, child in module.named_children():
            if child is not blocks and ("norm" in name or name == "ln_f"):
                yield child
