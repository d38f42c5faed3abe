"""The base model as a plain Hugging Face directory, whatever it came from."""

import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.quantization_config import GgufConfig

from stages.common.errors import InputError, SettingError
from stages.common.watched import warn_unless_watched
from stages.models.config import HubSource, ModelConfig, PackageSource, PathSource
from stages.models.load import load_policy, load_tokenizer, load_whole, move, quiet_transformers, save_model
from stages.models.shorten import shorten_model

WATCHED = Path("inputs/model")
"""The folder whose changes DVC sees."""

PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""For base models without a chat format: the messages' contents, joined."""
PLAIN_BOS = "{% if not messages[0]['content'].startswith(bos_token) %}{{ bos_token }}{% endif %}"
"""Before it where the tokenizer begins every text with its token: the model was trained with it at the start."""


def prepare_base_model(config: ModelConfig, save_to: Path) -> None:
    """Write the base model to `save_to`: bf16 safetensors, tokenizer, chat template.

    Raises:
        SettingError: the source does not exist, has no chat template where one is asked for, or fewer layers than are
            to be kept.
        InputError: its directory holds no weights or an unreadable file.
    """
    quiet_transformers()
    model, tokenizer = _load(config)
    if config.chat_template == "plain":
        tokenizer.chat_template = make_plain_template(tokenizer)
    if not tokenizer.chat_template:
        raise SettingError(
            "model.chat_template='own': the tokenizer of model.source has no chat template; set it to 'plain'"
        )
    if tokenizer.eos_token_id is None:
        raise SettingError("model.source: its tokenizer has no end-of-sequence token, so completions cannot end")
    if tokenizer.pad_token_id is None:  # masks are made from lengths, never from this id
        tokenizer.pad_token = tokenizer.eos_token
    shorten_model(model, config.keep_layers)
    save_model(move(model, torch.bfloat16), tokenizer, save_to)


def make_plain_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template of `model.chat_template: plain` for a base model with this tokenizer."""
    is_begun = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return f"{PLAIN_BOS}{PLAIN_TEMPLATE}" if is_begun else PLAIN_TEMPLATE


def _load(config: ModelConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    match config.source:
        case PackageSource() as source:
            return _load_gguf(_find_package_file(source))
        case PathSource(path=path):
            warn_unless_watched(Path(path), WATCHED)
            return load_policy(Path(path), dtype=torch.bfloat16), load_tokenizer(Path(path))
        case HubSource(repo=repo, revision=revision):
            return _load_hub(repo, revision)


def _find_package_file(source: PackageSource) -> Path:
    # find_spec, not import: the package's own code may need libraries that the lock leaves out.
    spec = importlib.util.find_spec(source.package)
    if spec is None or not spec.submodule_search_locations:
        raise SettingError(f"model.source.package={source.package!r} is not an installed package")
    folder = Path(next(iter(spec.submodule_search_locations)))
    file = folder / source.file
    if not file.is_file():
        found = sorted(path.name for path in folder.glob("*.gguf")) or "none"
        raise SettingError(f"model.source.file={source.file!r} is not in {source.package}; GGUF files there: {found}")
    return file


def _load_gguf(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        quantization = GgufConfig(dequantize=True)
        model = load_whole(AutoModelForCausalLM, file.parent, gguf_file=file.name, quantization_config=quantization)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not a readable GGUF model: {_first_line(error)}") from error
    model.config._name_or_path = file.stem
    return model, tokenizer


def _load_hub(repo: str, revision: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        model = load_whole(AutoModelForCausalLM, repo, revision=revision, dtype=torch.bfloat16, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(repo, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise SettingError(f"model.source.repo={repo!r} at {revision!r}: {_first_line(error)}") from error
    return model, tokenizer


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
