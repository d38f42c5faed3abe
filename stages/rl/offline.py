"""Offline DPO: the policy is trained on the labelled pairs; nothing is sampled, no reward model is read.

    labelled pairs ─► pair_batches.py ─► algorithms/dpo.py ─► learner ─► weights.py
                      their order, the reference's log-probabilities

The counts of section `rl` keep their meaning, a pair standing for a prompt. The best version is the one of lowest loss
on the validation pairs. A checkpoint holds the learner, its optimizer, the evaluations and the clock; which pairs an
update trains on follows from its number, so a run resumed at k equals one that never stopped.
"""

import functools
import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stages.common.guard import parse_cores
from stages.common.hashing import hash_paths
from stages.common.metrics import Mean, merge_means
from stages.data.records import Split, TooLong
from stages.data.text import LengthReport, require_kept
from stages.data.token_pairs import PairExample, encode_pairs, read_token_pairs
from stages.learner.checkpoint import commit_checkpoint, find_checkpoint
from stages.learner.engine import Learner, LossFunction, compute_type
from stages.learner.epochs import LogMetrics
from stages.learner.launch import open_ranks
from stages.learner.layout import settle_stage
from stages.learner.ranks import Ranks
from stages.learner.trainable import count_shared_blocks, load_trained_policy, shares_prompts
from stages.models.load import list_devices, require_context
from stages.models.sharding import call_as_forward
from stages.rl.algorithm_config import DpoConfig
from stages.rl.config import RlConfig
from stages.rl.kept import KeptCheckpoints
from stages.rl.ledger.offline import OfflineHeader, write_offline_ledger
from stages.rl.pair_batches import PairBatch, PairStream, build_pair_batches, compute_batch_loss
from stages.rl.placement import check_launched, pin_this_process, place
from stages.rl.progress import Progress
from stages.rl.reference import ReferenceSource
from stages.rl.rollouts import Reference
from stages.rl.stopping import StopRequested, StopSignals
from stages.rl.timeline import LEARNER, Timeline
from stages.rl.weights import link_policy

if TYPE_CHECKING:
    from stages.rl.train import PolicyOutputs

logger = logging.getLogger(__name__)

SETTING = "rl.learner"
USED = (
    "algorithm",
    "learner",
    "learner_devices",
    "num_updates",
    "prompts_per_update",
    "eval_every",
    "checkpoint_every",
    "keep_checkpoints",
    "seed",
    "replay_from",
)
"""Settings of section `rl` that an offline run follows, or refuses; the others are about sampling."""


@dataclass(frozen=True)
class OfflineInputs:
    """Artifacts the run starts from, and what it takes from other sections."""

    pairs: Path
    """Directory with train.parquet and validation.parquet."""
    sft: Path
    max_tokens: int
    """`reward.max_tokens`: the run sees the pairs that the reward model is trained on, and no others."""
    too_long: TooLong
    """`reward.too_long`."""
    temperature: float
    """`generation.temperature`: log-probabilities are of the distribution that the policy is sampled from."""


@dataclass(frozen=True)
class PairEvaluation:
    """One policy version on the validation pairs."""

    policy_version: int
    loss: float
    """Mean over pairs; in nats with the sigmoid loss."""
    accuracy: float
    """Share of pairs whose chosen completion has the higher implicit reward; a tie counts half."""
    margin: float
    """Mean implicit reward of the chosen completion minus that of the rejected one."""


@dataclass
class OfflineProgress:
    """What a resume needs besides learner and timeline."""

    first: PairEvaluation | None = None
    best: PairEvaluation | None = None
    last: PairEvaluation | None = None

    def note(self, evaluation: PairEvaluation) -> bool:
        """Take an evaluation in; whether it is the best so far, the lowest loss being the best."""
        self.first = self.first or evaluation
        self.last = evaluation
        is_best = self.best is None or evaluation.loss < self.best.loss
        if is_best:
            self.best = evaluation
        return is_best

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "OfflineProgress":
        """From what `asdict` gave."""
        return cls(**{name: PairEvaluation(**values) if values else None for name, values in state.items()})


@dataclass(frozen=True)
class OfflineResult:
    """What there is to report."""

    first: PairEvaluation
    best: PairEvaluation
    last: PairEvaluation
    num_pairs: int
    """Training pairs within the length limit."""
    num_validation_pairs: int
    lengths: LengthReport
    """Of the training pairs."""


def train_offline(
    inputs: OfflineInputs,
    config: RlConfig,
    timeline: Timeline,
    workdir: Path,
    save_to: "PolicyOutputs",
    log_metrics: LogMetrics,
) -> OfflineResult:
    """Train the SFT model on the labelled pairs.

    Args:
        inputs: pairs, SFT model.
        config: section `rl`, with the algorithm dpo.
        timeline: fresh; a checkpoint's clock is restored into it.
        workdir: checkpoints.
        save_to: directories of the best, the last and the kept policies, and of a ledger that says that nothing was
            sampled.
        log_metrics: called once per update.

    Raises:
        SettingError: devices or layers that are not there.
        InputError: pairs that are missing, not readable, or all too long.
        NonFiniteLossError: the run cannot go on; its last checkpoint is kept.
    """
    logger.info("nothing is sampled, so these settings have no effect: %s", ", ".join(list_unused()))
    train, lengths = _read_pairs(inputs, "train")
    validation, _ = _read_pairs(inputs, "validation")
    require_context(inputs.sft, max(map(len, train + validation)), f"reward.max_tokens={inputs.max_tokens}")
    devices = _place_learner(config)
    check_launched(devices)
    pin_this_process(devices)
    with open_ranks(config.learner, SETTING, workdir, sorted(parse_cores(devices))) as ranks:
        loop = OfflineLoop(make_models(ranks, inputs, config, workdir), inputs, config, timeline, workdir)
        loop.run(train, validation, log_metrics)
        loop.save(save_to)
    write_offline_ledger(save_to.ledger, _make_header(inputs, config, len(train)))
    first, best, last = loop.progress.first, loop.progress.best, loop.progress.last
    assert first is not None
    assert best is not None
    assert last is not None
    return OfflineResult(first, best, last, len(train), len(validation), lengths)


def list_unused() -> list[str]:
    """Paths of the settings that have no effect on an offline run."""
    return [f"rl.{name}" for name in RlConfig.model_fields if name not in USED]


@dataclass(frozen=True)
class OfflineModels:
    """What trains, and what it is held against."""

    ranks: Ranks
    learner: Learner
    reference: Reference


def make_models(ranks: Ranks, inputs: OfflineInputs, config: RlConfig, workdir: Path) -> OfflineModels:
    """Learner and reference, both at the SFT model's weights."""
    make_model = functools.partial(load_trained_policy, inputs.sft, config.learner, SETTING)
    settings = settle_stage(config.learner, workdir)
    learner = ranks.make_learner(make_model, settings, config.num_updates, workdir)
    trunk_depth = count_shared_blocks(config.learner, learner.model)
    policy = Reference(learner.model, config.learner.dtype, inputs.temperature, trunk_depth=trunk_depth)
    source = ReferenceSource(ranks, inputs.sft, policy, config.learner)
    return OfflineModels(ranks, learner, source.load())


class OfflineLoop:
    """Learner, reference and pairs, at the state of the newest checkpoint or at the start.

    Args:
        models: at the SFT model's weights.
        inputs: SFT model, temperature.
        config: section `rl`, with the algorithm dpo.
        timeline: see `train_offline`.
        workdir: checkpoints and the best version so far.
    """

    def __init__(
        self, models: OfflineModels, inputs: OfflineInputs, config: RlConfig, timeline: Timeline, workdir: Path
    ) -> None:
        assert isinstance(config.algorithm, DpoConfig)
        self._algorithm = config.algorithm
        self._config = config
        self._inputs = inputs
        self._timeline = timeline
        self._workdir = workdir
        self._kept = KeptCheckpoints(workdir, config.keep_checkpoints)
        self.progress = OfflineProgress()
        self._ranks = models.ranks
        self.learner = models.learner
        self._reference = models.reference
        self._resume()

    def run(self, train: list[PairExample], validation: list[PairExample], log_metrics: LogMetrics) -> None:
        """Make every update that is still to do.

        Args:
            train: the pairs to train on, in the order of their file.
            validation: pairs that say which version is the best.
            log_metrics: called once per update.

        Raises:
            NonFiniteLossError: the run cannot go on; its last checkpoint is kept.
            KeyboardInterrupt, SystemExit: it was asked to stop, and has a checkpoint of this very update.
        """
        stream = PairStream(train, self._config.prompts_per_update, self._config.seed)
        with StopSignals() as stop:
            try:
                held_out = self._build(validation)
                if self.progress.first is None:
                    metrics = self._evaluate(held_out, len(validation))
                    log_metrics({name: mean.value for name, mean in metrics.items()}, 0)
                while self.learner.updates < self._config.num_updates:
                    metrics = self._update(stream.get(self.learner.updates))
                    if self._is_due(self._config.eval_every) or self.learner.updates == self._config.num_updates:
                        metrics |= self._evaluate(held_out, len(validation))
                    log_metrics(self._describe(metrics, num_pairs=len(train)), self.learner.updates)
                    if self._is_due(self._config.checkpoint_every):
                        self._checkpoint()
                    stop.check()
            except StopRequested:
                self._checkpoint()
                stop.leave()

    def save(self, save_to: "PolicyOutputs") -> None:
        """Publish the version of lowest validation loss, the last one, and those that are kept."""
        link_policy(self._best_directory(), save_to.best)
        self._export(save_to.last)
        self._kept.publish(save_to.checkpoints)

    def _update(self, pairs: list[PairExample]) -> dict[str, Mean]:
        batches = self._build(pairs)
        with self._timeline.span(LEARNER, "learn", self.learner.updates):
            return self.learner.update(batches, self._loss_over(len(pairs)))

    def _build(self, pairs: list[PairExample]) -> list[PairBatch]:
        with self._timeline.span(LEARNER, "reference", self.learner.updates):
            return build_pair_batches(
                pairs,
                self._reference,
                self._config.learner.micro_batch_tokens,
                self._ranks,
                share_prompts=shares_prompts(self._config.learner, self.learner.model),
            )

    def _loss_over(self, num_pairs: int) -> LossFunction[PairBatch]:
        return functools.partial(
            compute_batch_loss,
            algorithm=self._algorithm,
            temperature=self._inputs.temperature,
            num_pairs=num_pairs,
        )

    def _evaluate(self, batches: list[PairBatch], num_pairs: int) -> dict[str, Mean]:
        """Loss of the learner's weights on the validation pairs; they are kept if it is the lowest so far."""
        version, compute_loss = self.learner.updates, self._loss_over(num_pairs)
        with self._timeline.span(LEARNER, "evaluate", version):
            compute = functools.partial(_evaluate_batch, self.learner.model, self._config.learner.dtype, compute_loss)
            parts = self._ranks.map(compute, batches)
            metrics = merge_means(part for _, part in parts)
            evaluation = PairEvaluation(
                policy_version=version,
                loss=sum(share.item() for share, _ in parts),
                accuracy=metrics["dpo/accuracy"].value,
                margin=metrics["dpo/margin"].value,
            )
            self._kept.add(self.learner.collect_weights, self._inputs.sft, version)
            if self.progress.note(evaluation):
                self._export(self._best_directory())
        logger.info(
            "evaluation policy_version=%d validation_loss=%.4f accuracy=%.3f margin=%.3f",
            *(version, evaluation.loss, evaluation.accuracy, evaluation.margin),
        )
        return {
            "dpo/validation_loss": Mean(evaluation.loss, 1),
            "dpo/validation_accuracy": Mean(evaluation.accuracy, 1),
            "dpo/validation_margin": Mean(evaluation.margin, 1),
        }

    def _export(self, target: Path) -> None:
        self._kept.export(self.learner.collect_weights, self._inputs.sft, self.learner.updates, target)

    def _describe(self, metrics: dict[str, Mean], num_pairs: int) -> dict[str, float]:
        version = self.learner.updates
        values = {name: mean.value for name, mean in metrics.items()} | Progress.describe_time(self._timeline)
        values |= {
            "dpo/passes": version * self._config.prompts_per_update / num_pairs,
            "learner/policy_version": version,
            "rollout/completions_total": 0,
        }
        logger.info(
            "update=%d/%d loss=%.4f accuracy=%.3f margin=%.3f",
            *(version, self._config.num_updates, values["learner/loss"], values["dpo/accuracy"], values["dpo/margin"]),
        )
        return values

    def _is_due(self, every: int) -> bool:
        return self.learner.updates % every == 0

    def _checkpoint(self) -> None:
        with self._timeline.span(LEARNER, "checkpoint", self.learner.updates):
            state = {"progress": asdict(self.progress), "timeline": self._timeline.state()}
            commit_checkpoint(self._workdir, self.learner.save, state)
            best = self._best_directory()
            for older in self._workdir.glob("best-v*"):  # the committed state names the only one still needed
                if older != best:
                    shutil.rmtree(older)

    def _resume(self) -> None:
        found = find_checkpoint(self._workdir)
        if found is None:
            return
        path, state = found
        self.learner.load(path)
        self._timeline.restore(state["timeline"])
        self.progress = OfflineProgress.from_state(state["progress"])
        logger.info("resumed policy_version=%d", self.learner.updates)

    def _best_directory(self) -> Path:
        assert self.progress.best is not None
        return self._workdir / f"best-v{self.progress.best.policy_version}"


@torch.no_grad()
def _evaluate_batch(
    model: PreTrainedModel, dtype: str, compute_loss: LossFunction[PairBatch], batch: PairBatch
) -> tuple[Tensor, dict[str, Mean]]:
    with compute_type(dtype, batch.reference_logprobs.device.type):
        return call_as_forward(model, compute_loss, batch)


def _read_pairs(inputs: OfflineInputs, split: Split) -> tuple[list[PairExample], LengthReport]:
    path = inputs.pairs / f"{split}.parquet"
    pairs, lengths = encode_pairs(read_token_pairs(path), max_tokens=inputs.max_tokens, too_long=inputs.too_long)
    limit = f"reward.max_tokens={inputs.max_tokens}, which rl.algorithm.name='dpo' keeps to as well"
    require_kept(str(path), "pairs", lengths, split, limit)
    return pairs, lengths


def _place_learner(config: RlConfig) -> str:
    """As `rl.learner_devices` says; every device for `auto`, since nobody else works."""
    nobody = config.generator.model_copy(update={"replicas": 0, "devices": "auto"})
    return place(config.model_copy(update={"generator": nobody}), list_devices()).learner


def _make_header(inputs: OfflineInputs, config: RlConfig, num_pairs: int) -> OfflineHeader:
    train, sft = str(inputs.pairs / "train.parquet"), str(inputs.sft)
    hashes = hash_paths((train, sft))
    return OfflineHeader(
        algorithm=config.algorithm.name,
        num_updates=config.num_updates,
        pairs_per_update=config.prompts_per_update,
        num_pairs=num_pairs,
        seed=config.seed,
        pairs_hash=hashes[train],
        model_hash=hashes[sft],
    )
