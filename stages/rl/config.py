"""Section `rl` of params.yaml."""

import math
from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from stages.common.config import Section
from stages.generation.config import FleetConfig, Publish
from stages.learner.config import LearnerConfig
from stages.rl.algorithm_config import AlgorithmConfig, DpoConfig, PolicyGradientConfig
from stages.rl.staleness import StalenessRule


class RlConfig(Section):
    """Reinforcement learning against the reward model. Counts are per optimizer update, over all ranks."""

    algorithm: AlgorithmConfig
    learner: LearnerConfig
    num_updates: PositiveInt
    """Optimizer updates of the whole run."""
    prompts_per_update: PositiveInt
    """Prompts of a mini-batch, which one update trains on."""
    updates_per_rollout: PositiveInt = 1
    """N: mini-batches sampled together."""
    epochs_per_rollout: PositiveInt = 1
    """T: times each mini-batch is trained on; above 1 where generation is what takes long."""
    max_staleness: int = Field(ge=0)
    """Updates by which a trained sample may be older than the weights that train on it. With U = N·T updates a
    rollout: U − 1 is synchronous, 2U − 1 one step off as in arXiv:2410.18252, more lets the generator run further
    ahead; see stages/rl/staleness.py."""
    weight_update: Literal["drain", "in_flight"] = "drain"
    """drain: a server finishes what it samples, then swaps weights; tickets are trained in order. in_flight: what runs
    is frozen, weights are swapped, it goes on; what finishes first may be trained first."""
    publish: Publish = "files"
    """How new weights get to vLLM's servers. files: by shared memory or `generator.weights_dir`, everywhere. nccl: from
    the learner's GPU to other GPUs. ipc: within the learner's own GPU. See docs/asynchronous_rl.md."""
    score_on: Literal["learner", "generator"] = "learner"
    """Whose device the reward model runs on. generator: groups are scored while the learner trains, on a machine
    without GPU on whichever core is idle."""
    reference_on: Literal["learner", "generator"] = "learner"
    """The same for the reference's log-probabilities."""
    generator: FleetConfig = FleetConfig()
    learner_devices: str = "auto"
    """CPU cores or GPUs of the learner, such as 1 or 2-3; auto: those the generator does not use."""
    stall_timeout_s: PositiveFloat = 1800.0
    """Seconds without any sign of life from the generator, while the learner waits for it, that end the run."""
    score_timeout_s: PositiveFloat = 120.0
    """Seconds after which the process that scores a group on the generator's devices is taken for hung."""
    replay_from: str | None = None
    """Train from this ledger instead of a generator; see docs/ledger.md. Put it under inputs/ledger to have it
    watched."""
    missing_eos_score: float | Literal["lowest"] = "lowest"
    """Score of a completion without its end; lowest: the lowest one seen on SFT samples, and a number must not
    be above that. In pairs a finished completion beats an unfinished one in any case."""
    eval_every: PositiveInt = 10
    """Updates between evaluations on the validation prompts."""
    num_eval_prompts: PositiveInt = 48
    """Validation prompts of each evaluation, evenly spaced: all of them come from as many groups as possible."""
    max_kl_nats: PositiveFloat = 10.0
    """The best checkpoint is the one of highest proxy score whose KL per completion is at most this."""
    checkpoint_every: PositiveInt = 10
    """Updates between resume points."""
    keep_checkpoints: NonNegativeInt | Literal["all"] = 0
    """Evaluated versions whose weights are kept in artifacts/checkpoints beside the best and the last: the newest N of
    them, or all. Version 0, the SFT model, is not among them."""
    max_logprob_gap: PositiveFloat = 0.3
    """Mean |generator's − learner's logprob| on the same version, in nats a token, that stops the run: above it the
    generator does not sample from the weights that were published. It bounds the probe of every publication, and the
    mini-batches whose staleness is 0."""
    seed: int = Field(default=0, ge=0)
    """Order of the prompts and all sampling."""

    @property
    def is_offline(self) -> bool:
        """Whether the run samples nothing."""
        return isinstance(self.algorithm, DpoConfig)

    @property
    def is_live(self) -> bool:
        """Whether the run has a generator: it neither is offline nor replays a recorded run."""
        return not self.is_offline and self.replay_from is None

    @property
    def rule(self) -> StalenessRule:
        """The bound and the shape of a rollout."""
        return StalenessRule(
            self.max_staleness, self.updates_per_rollout, self.epochs_per_rollout, self.prompts_per_update
        )

    @property
    def num_published(self) -> int:
        """Versions that may be published at once; see StalenessRule.count_published."""
        return self.rule.count_published(in_flight=self.weight_update == "in_flight")

    @model_validator(mode="after")
    def check_rollouts(self) -> Self:
        """The bound must be reachable and the run a whole number of rollouts; an offline run has neither."""
        if self.is_offline:
            return self
        shape = (
            f"rl.updates_per_rollout={self.updates_per_rollout} x rl.epochs_per_rollout={self.epochs_per_rollout} = "
            f"{self.rule.cycle} updates a rollout"
        )
        least = self.rule.cycle - 1
        if self.max_staleness < least:
            raise ValueError(
                f"rl.max_staleness={self.max_staleness} cannot be kept: {shape}, and the last of them trains samples "
                f"{least} updates old even when nothing runs ahead; allowed: {least} (synchronous), "
                f"{2 * self.rule.cycle - 1} (one step off) or any other number from {least} on"
            )
        if self.num_updates % self.rule.cycle:
            raise ValueError(f"rl.num_updates={self.num_updates} is not a multiple of {shape}")
        return self

    @model_validator(mode="after")
    def check_kv_cache(self) -> Self:
        """A drained server has no completion whose keys and values could be computed anew."""
        if self.generator.kv_cache == "recompute" and self.weight_update == "drain":
            raise ValueError(
                "rl.generator.kv_cache='recompute' does nothing with rl.weight_update='drain', where no completion "
                "runs while weights are swapped; leave it out, or set 'in_flight'"
            )
        return self

    @model_validator(mode="after")
    def check_missing_eos_score(self) -> Self:
        """It is a score like any other."""
        if self.missing_eos_score != "lowest" and not math.isfinite(self.missing_eos_score):
            raise ValueError(
                f"rl.missing_eos_score={self.missing_eos_score} is no score; allowed: a finite number, or 'lowest'"
            )
        return self

    @model_validator(mode="after")
    def check_baseline(self) -> Self:
        """A mini-batch of one prompt has no other prompts."""
        if getattr(self.algorithm, "baseline", None) == "other_prompts" and self.prompts_per_update < 2:
            raise ValueError(
                "rl.algorithm.baseline='other_prompts' with rl.prompts_per_update=1 is no baseline; allowed: at least "
                "2 prompts, or baseline 'none'"
            )
        return self

    @model_validator(mode="after")
    def check_reference(self) -> Self:
        """The other process sends log-probabilities of the sampled tokens, not whole distributions."""
        if not isinstance(self.algorithm, PolicyGradientConfig) or self.reference_on == "learner":
            return self
        if self.algorithm.kl_loss_coef > 0 and self.algorithm.kl_loss_estimator == "exact":
            raise ValueError(
                "rl.reference_on='generator' with rl.algorithm.kl_loss_estimator='exact': the learner needs the SFT "
                "model's whole distributions; set rl.reference_on to 'learner', or the estimator to 'k2' or 'k3'"
            )
        return self

    @model_validator(mode="after")
    def check_replay(self) -> Self:
        """A ledger holds samples, which an offline run does not train on."""
        if self.is_offline and self.replay_from is not None:
            raise ValueError(
                f"rl.replay_from={self.replay_from!r} with rl.algorithm.name='dpo': offline DPO trains on "
                "artifacts/pairs, not on recorded samples; set rl.replay_from to null"
            )
        return self
