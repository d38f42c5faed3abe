"""Two narrow layers of each architecture that a recipe names, with random weights and a tokenizer of bytes."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DistilBertConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from stages.plan.architecture import find_known
from tests.tiny import CHAT_TEMPLATE

CONTEXT = 320
CLASSIFIER_CONTEXT = 12
"""Shorter than prompt and completion, so that they are cut."""
NUM_UNUSED_ROWS = 5
"""Embeddings without a token, as models have whose vocabulary was rounded up."""
_NAMES = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "max_position_embeddings": CONTEXT}
WIDTHS: dict[str, dict[str, int]] = {
    "llama": _NAMES | {"intermediate_size": 64, "head_dim": 8},
    "gpt_neox": _NAMES | {"intermediate_size": 64},
    "opt": _NAMES | {"word_embed_proj_dim": 32, "ffn_dim": 64},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT},
}
# As the public tokenizers have them: only OPT's and SmolLM2-Instruct's have a pad token.
SPECIAL: dict[str, dict[str, str]] = {
    "llama-2": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "llama-3.1": {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
    "smollm2": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
    "gpt_neox": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
    "gpt2": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
    "opt": {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"},
}
_LLAMAS = {32_000: "llama-2", 128_256: "llama-3.1", 49_152: "smollm2"}
"""Whose tokenizer it is, by the size of its vocabulary."""


def save_toy_model(
    name: str, path: Path, seed: int = 0, *, with_template: bool = False, num_labels: int | None = None
) -> Path:
    """A directory as a person would have of a public model.

    Args:
        name: one that stages/plan/architectures knows.
        path: is filled.
        seed: of the weights.
        with_template: whether its tokenizer has a chat template.
        num_labels: outputs of a sequence classifier; None: a causal language model.
    """
    known = find_known(name)
    assert known is not None, name
    tokenizer = make_tokenizer(known.config, with_template=with_template)
    config = make_config(known.config, tokenizer)
    if num_labels is None:
        return save(AutoModelForCausalLM.from_config(config), tokenizer, path, seed)
    config.num_labels = num_labels
    return save(AutoModelForSequenceClassification.from_config(config), tokenizer, path, seed)


def save_toy_classifier(path: Path, seed: int = 0) -> Path:
    """A sentiment classifier, DistilBERT as such ones often are, whose tokens are letters and so none of a policy's."""
    symbols = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(chr(number) for number in range(97, 123))]
    tokenizer = Tokenizer(models.WordLevel({symbol: index for index, symbol in enumerate(symbols)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    config = DistilBertConfig(
        vocab_size=len(symbols),
        dim=32,
        hidden_dim=64,
        n_layers=2,
        n_heads=4,
        max_position_embeddings=CLASSIFIER_CONTEXT,
    )
    config.id2label, config.label2id = {0: "NEGATIVE", 1: "POSITIVE"}, {"NEGATIVE": 0, "POSITIVE": 1}
    return save(AutoModelForSequenceClassification.from_config(config), fast, path, seed)


def make_config(known: PretrainedConfig, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    """The architecture of a known model, two narrow layers of it."""
    widths = dict(WIDTHS[known.model_type])
    if known.model_type == "llama":
        widths["num_key_value_heads"] = 4 if known.num_key_value_heads == known.num_attention_heads else 2
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    own = {"model_type": known.model_type, "vocab_size": len(tokenizer) + NUM_UNUSED_ROWS}
    return AutoConfig.for_model(**known.to_diff_dict() | own | widths | special)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, path: Path, seed: int) -> Path:
    """With random matrices large enough to tell tokens apart."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def make_tokenizer(known: PretrainedConfig, *, with_template: bool = False) -> PreTrainedTokenizerFast:
    """A token for each byte, without merges, and the special tokens of a known model's tokenizer."""
    kind = _LLAMAS[known.vocab_size] if known.model_type == "llama" else known.model_type
    special = SPECIAL[kind]
    tokenizer = _make_pieces(special) if kind == "llama-2" else _make_bytes(special)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    if with_template:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def _make_bytes(special: dict[str, str]) -> Tokenizer:
    symbols = [*dict.fromkeys(special.values()), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _make_pieces(special: dict[str, str]) -> Tokenizer:
    """As a SentencePiece model is converted: a space is a letter, and one stands before the text."""
    symbols = [*special.values(), "▁", *(chr(number) for number in range(33, 127))]
    symbols += [f"<0x{number:02X}>" for number in range(256)]
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer
