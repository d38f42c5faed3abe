"""How every TRL trainer in bench/trl_agreement.py is set up."""

from typing import Any

from agreement import Recorded


def trainer_settings(recorded: Recorded, batch_size: int) -> dict[str, Any]:
    """What departs from TRL's defaults: float32 instead of bf16, and nothing that saves memory or reports."""
    return {
        "output_dir": str(recorded.directory / "trl"),
        "per_device_train_batch_size": batch_size,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }


def load_trl_tokenizer(recorded: Recorded, pad_is_eos: bool) -> Any:
    """The model's tokenizer; for `pad ≠ EOS` it pads with a token that the batch does not contain."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(recorded.contents["model_path"])
    spare = next(token for token in ("<|endoftext|>", "<unk>") if token in tokenizer.get_vocab())
    tokenizer.pad_token = tokenizer.eos_token if pad_is_eos else spare
    return tokenizer
