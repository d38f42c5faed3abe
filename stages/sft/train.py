"""SFT: negative log-likelihood of completions.

The loss of a batch is the mean over its completion tokens, the end-of-sequence token included: what TRL's
SFTTrainer computes with completion-only loss, whatever the split into micro-batches.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stages.common.metrics import Mean
from stages.data.batches import SequenceBatch, collate, split_by_tokens
from stages.data.records import Demonstration
from stages.data.text import (
    LengthReport,
    TokenSequence,
    encode_completion,
    encode_prompt,
    limit_lengths,
    require_kept,
)
from stages.learner.engine import LossFunction, compute_type
from stages.learner.epochs import Epochs, LogMetrics, train_epochs
from stages.learner.launch import open_ranks
from stages.learner.layout import settle_stage
from stages.learner.logprobs import compute_logprobs
from stages.learner.ranks import ALONE, Ranks
from stages.learner.trainable import load_trained_policy, save_trained
from stages.models.load import list_devices, load_policy, load_tokenizer, require_context, select_device
from stages.models.sharding import call_as_forward
from stages.sft.config import SftConfig

SETTING = "sft.learner"


@dataclass(frozen=True)
class SftResult:
    """What the stage reports."""

    eval_loss_before: float
    """Nats per completion token on the validation demonstrations, before training."""
    eval_loss: float
    """The same after training."""
    train_lengths: LengthReport
    validation_lengths: LengthReport

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
        InputError: a split has no demonstration, or none within `max_tokens`.
        SettingError: `max_tokens` lets in more than the model can read.
    """
    tokenizer = load_tokenizer(init_from)
    train, train_lengths = encode_demonstrations(tokenizer, demonstrations["train"], config)
    validation, validation_lengths = encode_demonstrations(tokenizer, demonstrations["validation"], config)
    limit = f"sft.max_tokens={config.max_tokens}"
    require_kept("artifacts/data", "demonstrations", train_lengths, "train", limit)
    require_kept("artifacts/data", "demonstrations", validation_lengths, "validation", limit)
    require_context(init_from, max(map(len, train + validation)), f"sft.max_tokens={config.max_tokens}")
    epochs = Epochs[TokenSequence, SequenceBatch](
        examples=train,
        lengths=[len(sequence) for sequence in train],
        batch_size=config.batch_size,
        num_epochs=config.num_epochs,
        seed=config.seed,
        split=lambda examples: split_sequences(examples, config.learner.micro_batch_tokens, config.learner.num_ranks),
        checkpoint_every=config.checkpoint_every,
    )
    with open_ranks(config.learner, SETTING, workdir, list_devices()) as ranks:
        make_model = functools.partial(load_trained_policy, init_from, config.learner, SETTING)
        settings = settle_stage(config.learner, workdir)
        learner = ranks.make_learner(make_model, settings, epochs.total_updates, workdir)
        before = evaluate(learner.model, validation, config, ranks)
        log_metrics({"eval/loss": before}, 0)
        train_epochs(learner, epochs, make_loss_function, workdir, log_metrics)
        after = evaluate(learner.model, validation, config, ranks)
        log_metrics({"eval/loss": after}, learner.updates)
        save_trained(learner, functools.partial(load_policy, init_from, torch.float32), tokenizer, save_to)
    return SftResult(before, after, train_lengths, validation_lengths)


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


def split_sequences(sequences: list[TokenSequence], max_tokens: int, num_ranks: int = 1) -> list[SequenceBatch]:
    """Micro-batches of similar length, at most `max_tokens` padded tokens each, as many for every rank."""
    groups = split_by_tokens([len(sequence) for sequence in sequences], max_tokens, num_ranks)
    return [collate([sequences[index] for index in group], select_device()) for group in groups]


def make_loss_function(examples: list[TokenSequence]) -> LossFunction[SequenceBatch]:
    """The loss of a micro-batch of `examples`, normalised by the tokens of all of them."""
    return functools.partial(_compute_loss, num_tokens=sum(len(example.completion_ids) for example in examples))


def _compute_loss(model: PreTrainedModel, batch: SequenceBatch, *, num_tokens: int) -> tuple[Tensor, dict[str, Mean]]:
    nll = -compute_logprobs(model, batch).sum()
    return nll / num_tokens, {"sft/loss_per_token": Mean(nll.detach(), batch.completion_mask.sum())}


def evaluate(model: PreTrainedModel, sequences: list[TokenSequence], config: SftConfig, ranks: Ranks = ALONE) -> float:
    """Mean negative log-likelihood per completion token, in nats.

    Args:
        model: a learner's of these ranks, or a plain one of this process alone.
        sequences: prompts with the completions that are evaluated.
        config: compute type, size of micro-batches.
        ranks: who computes.
    """
    batches = split_sequences(sequences, config.learner.micro_batch_tokens, ranks.size)
    sums = ranks.map(functools.partial(_sum_logprobs, model, config.learner.dtype), batches)
    total = Mean(0.0, 0)
    for batch, logprobs in zip(batches, sums, strict=True):
        total += Mean(-logprobs.item(), int(batch.completion_mask.sum()))
    return total.value


@torch.no_grad()
def _sum_logprobs(model: PreTrainedModel, dtype: str, batch: SequenceBatch) -> Tensor:
    with compute_type(dtype, batch.input_ids.device.type):
        return call_as_forward(model, compute_logprobs, batch).sum()
