"""SFT: negative log-likelihood of completions.

The loss of a batch is the mean over its completion tokens, the end-of-sequence token included: what TRL's
SFTTrainer computes with completion-only loss, whatever the split into micro-batches.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stages.common.errors import InputError
from stages.common.metrics import Mean
from stages.data.batches import SequenceBatch, collate, split_by_tokens
from stages.data.records import Demonstration
from stages.data.text import LengthReport, TokenSequence, encode_completion, encode_prompt, limit_lengths
from stages.learner.engine import Learner, LossFunction, compute_type
from stages.learner.epochs import Epochs, LogMetrics, train_epochs
from stages.learner.logprobs import compute_logprobs, require_plain_head
from stages.models.load import load_policy, load_tokenizer, move, save_model, select_device, select_trainable
from stages.sft.config import SftConfig


@dataclass(frozen=True)
class SftResult:
    """What the stage reports."""

    eval_loss_before: float
    """Nats per completion token on the validation demonstrations, before training."""
    eval_loss: float
    """The same after training."""
    train_lengths: LengthReport

    @property
    def perplexity(self) -> float:
        """exp(eval_loss), per completion token."""
        return math.exp(self.eval_loss)


def train_sft_model(
    demonstrations: dict[str, list[Demonstration]],
    init_from: Path,
    config: SftConfig,
    workdir: Path,
    save_to: Path,
    log_metrics: LogMetrics,
) -> SftResult:
    """Fine-tune the model in `init_from` on `demonstrations["train"]`; evaluate on `["validation"]`.

    Raises:
        InputError: no demonstration is left within `max_tokens`.
    """
    tokenizer = load_tokenizer(init_from)
    train, lengths = encode_demonstrations(tokenizer, demonstrations["train"], config)
    validation, _ = encode_demonstrations(tokenizer, demonstrations["validation"], config)
    if not train or not validation:
        raise InputError(f"artifacts/data: no demonstration fits into sft.max_tokens={config.max_tokens}")
    model = load_policy(init_from, torch.float32)
    require_plain_head(model)
    select_trainable(model, config.learner.trainable_layers, "sft.learner.trainable_layers")
    epochs = Epochs[TokenSequence, SequenceBatch](
        examples=train,
        lengths=[len(sequence) for sequence in train],
        batch_size=config.batch_size,
        num_epochs=config.num_epochs,
        seed=config.seed,
        split=lambda examples: split_sequences(examples, config.learner.micro_batch_tokens),
        checkpoint_every=config.checkpoint_every,
    )
    before = evaluate(move(model, select_device()), validation, config)
    log_metrics({"eval/loss": before}, 0)
    learner = Learner(model, config.learner, epochs.total_updates, rescue_dir=workdir)
    train_epochs(learner, epochs, make_loss_function, workdir, log_metrics)
    after = evaluate(learner.model, validation, config)
    log_metrics({"eval/loss": after}, learner.updates)
    save_model(move(learner.model, torch.bfloat16), tokenizer, save_to)
    return SftResult(before, after, lengths)


def encode_demonstrations(
    tokenizer: PreTrainedTokenizerBase, demonstrations: Sequence[Demonstration], config: SftConfig
) -> tuple[list[TokenSequence], LengthReport]:
    """Demonstrations as token ids, the over-long ones dropped or truncated and counted."""
    sequences = (
        TokenSequence(encode_prompt(tokenizer, item.prompt), encode_completion(tokenizer, item.completion))
        for item in demonstrations
    )
    return limit_lengths(
        sequences,
        sequences=lambda sequence: [sequence],
        rebuild=lambda _, parts: parts[0],
        max_tokens=config.max_tokens,
        too_long=config.too_long,
    )


def split_sequences(sequences: list[TokenSequence], max_tokens: int) -> list[SequenceBatch]:
    """Micro-batches of similar length, at most `max_tokens` padded tokens each."""
    groups = split_by_tokens([len(sequence) for sequence in sequences], max_tokens)
    return [collate([sequences[index] for index in group], select_device()) for group in groups]


def make_loss_function(examples: list[TokenSequence]) -> LossFunction[SequenceBatch]:
    """The loss of a micro-batch of `examples`, normalised by the tokens of all of them."""
    num_tokens = sum(len(example.completion_ids) for example in examples)

    def compute_loss(model: PreTrainedModel, batch: SequenceBatch) -> tuple[Tensor, dict[str, Mean]]:
        nll = -compute_logprobs(model, batch).sum()
        return nll / num_tokens, {"sft/loss_per_token": Mean(nll.detach(), batch.completion_mask.sum())}

    return compute_loss


@torch.no_grad()
def evaluate(model: PreTrainedModel, sequences: list[TokenSequence], config: SftConfig) -> float:
    """Mean negative log-likelihood per completion token, in nats."""
    total = Mean(0.0, 0)
    with compute_type(config.learner.dtype, next(model.parameters()).device.type):
        for batch in split_sequences(sequences, config.learner.micro_batch_tokens):
            total += Mean(-compute_logprobs(model, batch).sum().item(), int(batch.completion_mask.sum()))
    return total.value
