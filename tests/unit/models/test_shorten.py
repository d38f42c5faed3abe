from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, OPTConfig, PretrainedConfig

from stages.common.errors import SettingError
from stages.models.config import ModelConfig
from stages.models.load import find_blocks, load_policy, save_model
from stages.models.shorten import choose_layers, shorten_config
from stages.models.source import prepare_base_model
from tests.tiny import save_tiny_model, tiny_tokenizer

SIZE = {"vocab_size": 259, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 5}
ARCHITECTURES: list[PretrainedConfig] = [
    LlamaConfig(**SIZE, intermediate_size=32, tie_word_embeddings=True),
    GPTNeoXConfig(**SIZE, intermediate_size=32),
    GPT2Config(vocab_size=259, n_embd=16, n_head=2, n_layer=5),
    OPTConfig(**SIZE, ffn_dim=32, word_embed_proj_dim=16),
]


def test_the_kept_layers_are_evenly_spaced() -> None:
    assert choose_layers(30, 8) == [0, 4, 8, 12, 17, 21, 25, 29]  # 29 / 7 = 4.14 apart
    assert choose_layers(5, 3) == [0, 2, 4]
    assert choose_layers(4, 3) == [0, 2, 3]  # the middle, 1.5, is rounded up


@given(num_layers=st.integers(2, 200), data=st.data())
def test_first_and_last_are_kept_and_none_twice(num_layers: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(2, num_layers))

    chosen = choose_layers(num_layers, keep)

    assert (chosen[0], chosen[-1]) == (0, num_layers - 1)
    assert sorted(set(chosen)) == chosen
    assert len(chosen) == keep


@pytest.mark.parametrize("config", ARCHITECTURES, ids=lambda config: str(config.model_type))
def test_a_shortened_model_has_the_weights_of_its_layers_and_samples_with_a_cache(
    config: PretrainedConfig, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    save_model(AutoModelForCausalLM.from_config(config), tiny_tokenizer(), tmp_path / "source")
    source = {"kind": "path", "path": str(tmp_path / "source")}

    prepare_base_model(ModelConfig.model_validate({"source": source, "keep_layers": 3}), tmp_path / "base")

    before, after = (load_policy(tmp_path / name, torch.float32) for name in ("source", "base"))
    assert after.config.num_hidden_layers == 3
    for index, block in zip((0, 2, 4), find_blocks(after), strict=True):
        for name, weight in find_blocks(before)[index].state_dict().items():
            torch.testing.assert_close(block.state_dict()[name], weight, atol=0, rtol=0.005)  # saved in bf16
    ids = torch.tensor([[5, 6, 7, 8]])
    cache = after(ids[:, :3], use_cache=True).past_key_values
    stepwise = after(ids[:, 3:], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(stepwise, after(ids).logits[:, -1], atol=1e-5, rtol=1e-4)


def test_the_kinds_of_layers_follow_them() -> None:
    config = PretrainedConfig()
    config.num_hidden_layers = 4
    config.layer_types = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]

    shorten_config(config, 2)

    assert (config.num_hidden_layers, config.layer_types) == (2, ["full_attention", "full_attention"])


def test_more_layers_than_there_are_are_refused(tmp_path: Path) -> None:
    source = {"kind": "path", "path": str(save_tiny_model(tmp_path / "source"))}
    config = ModelConfig.model_validate({"source": source, "keep_layers": 3})

    with pytest.raises(SettingError, match=r"model\.keep_layers=3: .* has 2 layers; allowed: 'all' or 2…2"):
        prepare_base_model(config, tmp_path / "base")
