"""Random models of two layers, a Llama among them with a byte-level tokenizer: real code paths in milliseconds."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from stages.models.load import save_model

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "ffn_dim": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "word_embed_proj_dim": 32,
    "max_position_embeddings": 64,
    "vocab_size": 50,
}
GPT2 = {"n_embd": 32, "n_head": 4, "n_positions": 64, "vocab_size": 50}


def tiny_model(architecture: str, layers: int = 2, **settings: object) -> PreTrainedModel:
    """A causal language model of 50 tokens, of any of the architectures that `can_share_prompts`."""
    if architecture == "gpt2":
        config = AutoConfig.for_model(architecture, **GPT2, n_layer=layers)
    else:
        config = AutoConfig.for_model(
            architecture, **SIZES, **{"sliding_window": None} | settings, num_hidden_layers=layers
        )
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    return model


def tiny_llama(seed: int = 0, vocab_size: int = 259, layers: int = 2, head_dim: int = 8) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=258,
        pad_token_id=258,
        bos_token_id=257,
    )
    generator = torch.Generator().manual_seed(seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """Bytes and two special tokens; pad = eos, the trap the default model sets too."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    vocabulary |= {"<unk>": 256, "<|im_start|>": 257, "<|im_end|>": 258}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_tiny_model(path: Path, seed: int = 0, head_dim: int = 8) -> Path:
    save_model(tiny_llama(seed, head_dim=head_dim), tiny_tokenizer(), path)
    AutoTokenizer.from_pretrained(path)  # it can be read back
    return path
