"""Bradley–Terry training of the reward model.

Paper: Bradley & Terry 1952; as a language-model loss Stiennon et al. 2020, arXiv:2009.01325, eq. 1:
loss = −E log σ(score(chosen) − score(rejected)). Departures: none; a batch's loss is the mean over its pairs.
Shapes: B pairs, 2B sequences with the chosen ones first.
"""

import functools
from collections.abc import Callable, Sequence
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
from stages.data.text import LengthReport, TokenSequence, require_kept
from stages.data.token_pairs import PairExample, TokenPair, encode_pairs
from stages.learner.engine import LossFunction, compute_type
from stages.learner.epochs import Epochs, LogMetrics, train_epochs
from stages.learner.launch import open_ranks
from stages.learner.layout import settle_stage
from stages.learner.ranks import ALONE, Ranks
from stages.learner.trainable import load_trained_reward, save_trained
from stages.models.load import list_devices, load_tokenizer, require_context, select_device
from stages.models.reward_model import RANGE, SHIFT, compute_scores, init_reward_model
from stages.models.sharding import call_as_forward
from stages.reward.config import RewardConfig

SETTING = "reward.learner"
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
    train_lengths: LengthReport
    validation_lengths: LengthReport


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
        InputError: there is no pair, or none is left within `max_tokens`.
        SettingError: `max_tokens` lets in more than the model can read.
    """
    for split, pairs in (("train", data.train), ("validation", data.validation)):
        if not pairs:
            raise InputError(f"artifacts/pairs: no pairs in split {split}; the log of stage label_pairs says why")
    train, train_lengths = encode_pairs(data.train, max_tokens=config.max_tokens, too_long=config.too_long)
    validation, validation_lengths = encode_pairs(
        data.validation, max_tokens=config.max_tokens, too_long=config.too_long
    )
    for split, lengths in (("train", train_lengths), ("validation", validation_lengths)):
        require_kept("artifacts/pairs", "pairs", lengths, split, f"reward.max_tokens={config.max_tokens}")
    require_context(init_from, max(map(len, train + validation)), f"reward.max_tokens={config.max_tokens}")
    epochs = Epochs[PairExample, SequenceBatch](
        examples=train,
        lengths=[len(example) for example in train],
        batch_size=config.batch_size,
        num_epochs=config.num_epochs,
        seed=config.seed,
        split=lambda examples: split_pairs(examples, config.learner.micro_batch_tokens, config.learner.num_ranks),
        checkpoint_every=config.checkpoint_every,
    )
    with open_ranks(config.learner, SETTING, workdir, list_devices()) as ranks:
        make_model = functools.partial(load_trained_reward, init_from, config.learner, SETTING, config.seed)
        settings = settle_stage(config.learner, workdir)
        learner = ranks.make_learner(make_model, settings, epochs.total_updates, workdir)
        train_epochs(learner, epochs, make_loss_function, workdir, log_metrics)
        centre_scores(learner.model, data.samples, config, ranks)
        margins = compute_margins(learner.model, validation, config, ranks)
        make_plain = functools.partial(init_reward_model, init_from, torch.float32, config.seed)
        save_trained(learner, make_plain, load_tokenizer(init_from), save_to)
    return TrainedReward(margins, [example.prompt_id for example in validation], train_lengths, validation_lengths)


def split_pairs(examples: list[PairExample], max_tokens: int, num_ranks: int = 1) -> list[SequenceBatch]:
    """Micro-batches of pairs of similar length, as many for every rank; the chosen halves come first in each."""
    groups = split_by_tokens([2 * len(example) for example in examples], max_tokens, num_ranks)
    batches = []
    for group in groups:
        members = [examples[index] for index in group]
        sequences = [example.chosen for example in members] + [example.rejected for example in members]
        batches.append(collate(sequences, select_device()))
    return batches


def make_loss_function(examples: list[PairExample]) -> LossFunction[SequenceBatch]:
    """The loss of a micro-batch of `examples`, normalised by the number of all of them."""
    return functools.partial(_compute_loss, num_pairs=len(examples))


def _compute_loss(model: PreTrainedModel, batch: SequenceBatch, *, num_pairs: int) -> tuple[Tensor, dict[str, Mean]]:
    margins = score_margins(model, batch)  # [B]
    metrics = {
        "reward/margin": Mean(margins.detach().sum(), len(margins)),
        "reward/accuracy": Mean((margins > 0).float().sum(), len(margins)),
    }
    return bradley_terry_loss(margins) / num_pairs, metrics


def bradley_terry_loss(margins: Tensor) -> Tensor:
    """Sum over pairs of −log σ(margin), in nats. [B] -> []"""
    return -logsigmoid(margins).sum()


def score_margins(model: PreTrainedModel, batch: SequenceBatch) -> Tensor:
    """Score of each chosen completion minus that of its rejected one. [B]"""
    chosen, rejected = compute_scores(model, batch).chunk(2)
    return chosen - rejected


def compute_margins(
    model: PreTrainedModel, examples: list[PairExample], config: RewardConfig, ranks: Ranks = ALONE
) -> list[float]:
    """Margin of every pair, in order."""
    margins = [0.0] * len(examples)
    lengths = [2 * len(example) for example in examples]
    groups = split_by_tokens(lengths, config.learner.micro_batch_tokens, ranks.size)
    # split_pairs sorts by length; within one group that order is the group's own.
    batches = [split_pairs([examples[index] for index in group], max_tokens=2**62)[0] for group in groups]
    found = ranks.map(functools.partial(_compute, score_margins, model, config.learner.dtype), batches)
    for group, values in zip(groups, found, strict=True):
        for index, value in zip(group, values.tolist(), strict=True):
            margins[index] = value
    return margins


def centre_scores(
    model: PreTrainedModel, samples: Sequence[Completion], config: RewardConfig, ranks: Ranks = ALONE
) -> None:
    """Shift scores to mean 0 on SFT samples and remember their range, in the model's config.

    The zero point makes scores of different reward models comparable and gives the missing-EOS penalty a scale.
    """
    stride = -(-len(samples) // MAX_CENTRING_SAMPLES)
    sequences = [TokenSequence(item.prompt_ids, item.token_ids) for item in samples[::stride]]
    lengths = [len(sequence) for sequence in sequences]
    groups = split_by_tokens(lengths, config.learner.micro_batch_tokens, ranks.size)
    batches = [collate([sequences[index] for index in group], select_device()) for group in groups]
    found = ranks.map(functools.partial(_compute, _score_batch, model, config.learner.dtype), batches)
    scores = [score for values in found for score in values.tolist()]
    shift = sum(scores) / len(scores)
    setattr(model.config, SHIFT, getattr(model.config, SHIFT) + shift)
    setattr(model.config, RANGE, [min(scores) - shift, max(scores) - shift])


@torch.no_grad()
def _compute(
    function: Callable[[PreTrainedModel, SequenceBatch], Tensor],
    model: PreTrainedModel,
    dtype: str,
    batch: SequenceBatch,
) -> Tensor:
    with compute_type(dtype, batch.input_ids.device.type):
        return call_as_forward(model, function, batch)


def _score_batch(model: PreTrainedModel, batch: SequenceBatch) -> Tensor:
    return compute_scores(model, batch)
