"""Bradley–Terry training of the reward model.

Paper: Bradley & Terry 1952; as a language-model loss Stiennon et al. 2020, arXiv:2009.01325, eq. 1:
loss = −E log σ(score(chosen) − score(rejected)). Departures: none; a batch's loss is the mean over its pairs.
Shapes: B pairs, 2B sequences with the chosen ones first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel

from stages.common.errors import InputError
from stages.common.metrics import Mean
from stages.data.batches import SequenceBatch, collate, split_by_tokens
from stages.data.records import Completion
from stages.data.text import LengthReport, TokenSequence
from stages.data.token_pairs import PairExample, TokenPair, encode_pairs
from stages.learner.engine import Learner, LossFunction, compute_type
from stages.learner.epochs import Epochs, LogMetrics, train_epochs
from stages.models.load import load_tokenizer, move, save_model, select_device, select_trainable
from stages.models.reward_model import RANGE, SHIFT, compute_scores, init_reward_model
from stages.reward.config import RewardConfig

MAX_CENTRING_SAMPLES = 400
"""SFT samples that scores are centred on, spread evenly over all prompts: the mean is then known to 5 % of the
scores' standard deviation."""


@dataclass(frozen=True)
class RewardData:
    """What the stage reads."""

    train: list[TokenPair]
    validation: list[TokenPair]
    samples: Sequence[Completion]
    """Completions of the SFT model, on which scores are centred."""


@dataclass(frozen=True)
class TrainedReward:
    """A trained model and how it judges the validation pairs."""

    margins: list[float]
    """Score of chosen minus score of rejected, per validation pair."""
    prompt_ids: list[str]
    """Prompt of each margin."""
    lengths: LengthReport


def train_reward_model(
    data: RewardData,
    init_from: Path,
    config: RewardConfig,
    workdir: Path,
    save_to: Path,
    log_metrics: LogMetrics,
) -> TrainedReward:
    """Train on the training pairs, centre the scores on SFT samples, judge the validation pairs.

    Raises:
        InputError: no pair is left within `max_tokens`.
    """
    train, lengths = encode_pairs(data.train, max_tokens=config.max_tokens, too_long=config.too_long)
    validation, _ = encode_pairs(data.validation, max_tokens=config.max_tokens, too_long=config.too_long)
    if not train or not validation:
        raise InputError(f"artifacts/pairs: no pair fits into reward.max_tokens={config.max_tokens}")
    model = init_reward_model(init_from, torch.float32, config.seed)
    select_trainable(model, config.learner.trainable_layers, "reward.learner.trainable_layers")
    model.score.requires_grad_(True)
    epochs = Epochs[PairExample, SequenceBatch](
        examples=train,
        lengths=[len(example) for example in train],
        batch_size=config.batch_size,
        num_epochs=config.num_epochs,
        seed=config.seed,
        split=lambda examples: split_pairs(examples, config.learner.micro_batch_tokens),
        checkpoint_every=config.checkpoint_every,
    )
    learner = Learner(model, config.learner, epochs.total_updates, rescue_dir=workdir)
    train_epochs(learner, epochs, make_loss_function, workdir, log_metrics)
    centre_scores(learner.model, data.samples, config)
    margins = compute_margins(learner.model, validation, config)
    save_model(move(learner.model, torch.bfloat16), load_tokenizer(init_from), save_to)
    return TrainedReward(margins, [example.prompt_id for example in validation], lengths)


def split_pairs(examples: list[PairExample], max_tokens: int) -> list[SequenceBatch]:
    """Micro-batches of pairs of similar length; the chosen halves come first in each."""
    groups = split_by_tokens([2 * len(example) for example in examples], max_tokens)
    batches = []
    for group in groups:
        members = [examples[index] for index in group]
        sequences = [example.chosen for example in members] + [example.rejected for example in members]
        batches.append(collate(sequences, select_device()))
    return batches


def make_loss_function(examples: list[PairExample]) -> LossFunction[SequenceBatch]:
    """The loss of a micro-batch of `examples`, normalised by the number of all of them."""
    num_pairs = len(examples)

    def compute_loss(model: PreTrainedModel, batch: SequenceBatch) -> tuple[Tensor, dict[str, Mean]]:
        margins = score_margins(model, batch)  # [B]
        metrics = {
            "reward/margin": Mean(margins.detach().sum(), len(margins)),
            "reward/accuracy": Mean((margins > 0).float().sum(), len(margins)),
        }
        return bradley_terry_loss(margins) / num_pairs, metrics

    return compute_loss


def bradley_terry_loss(margins: Tensor) -> Tensor:
    """Sum over pairs of −log σ(margin), in nats. [B] -> []"""
    return -logsigmoid(margins).sum()


def score_margins(model: PreTrainedModel, batch: SequenceBatch) -> Tensor:
    """Score of each chosen completion minus that of its rejected one. [B]"""
    chosen, rejected = compute_scores(model, batch.input_ids, batch.attention_mask).chunk(2)
    return chosen - rejected


@torch.no_grad()
def compute_margins(model: PreTrainedModel, examples: list[PairExample], config: RewardConfig) -> list[float]:
    """Margin of every pair, in order."""
    margins = [0.0] * len(examples)
    device = next(model.parameters()).device.type
    groups = split_by_tokens([2 * len(example) for example in examples], config.learner.micro_batch_tokens)
    for group in groups:
        (batch,) = split_pairs([examples[index] for index in group], max_tokens=2**62)
        with compute_type(config.learner.dtype, device):
            values = score_margins(model, batch)
        # split_pairs sorts by length; within one group that order is the group's own.
        for index, value in zip(group, values.tolist(), strict=True):
            margins[index] = value
    return margins


@torch.no_grad()
def centre_scores(model: PreTrainedModel, samples: Sequence[Completion], config: RewardConfig) -> None:
    """Shift scores to mean 0 on SFT samples and remember their range, in the model's config.

    The zero point makes scores of different reward models comparable and gives the missing-EOS penalty a scale.
    """
    stride = -(-len(samples) // MAX_CENTRING_SAMPLES)
    sequences = [TokenSequence(item.prompt_ids, item.token_ids) for item in samples[::stride]]
    scores: list[float] = []
    device = next(model.parameters()).device.type
    for group in split_by_tokens([len(sequence) for sequence in sequences], config.learner.micro_batch_tokens):
        batch = collate([sequences[index] for index in group], select_device())
        with compute_type(config.learner.dtype, device):
            scores += compute_scores(model, batch.input_ids, batch.attention_mask).tolist()
    shift = sum(scores) / len(scores)
    setattr(model.config, SHIFT, getattr(model.config, SHIFT) + shift)
    setattr(model.config, RANGE, [min(scores) - shift, max(scores) - shift])
