"""The RL loop: sample, score, learn, publish; then the same with the newer weights.

Every completion is sampled by exactly the weights it trains (staleness 0). A checkpoint holds the learner, its
optimizer, how many rollouts were drawn (which fixes prompts and seeds), the best evaluation and the clock.
"""

import functools
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stages.common.errors import RunError
from stages.common.metrics import Mean
from stages.common.progress import progress
from stages.generation.config import GenerationConfig
from stages.generation.protocol import Generator, Request, SamplingPlan
from stages.learner.checkpoint import commit_checkpoint, find_checkpoint
from stages.learner.engine import Learner
from stages.rl.algorithms.protocol import Algorithm
from stages.rl.config import RlConfig
from stages.rl.prompts import select_prompts
from stages.rl.rollouts import Reference, build_micro_batches, build_rollout, compute_loss, describe_rollout
from stages.rl.scorer import score_completions
from stages.rl.validation import Evaluation, estimate_kl, is_better
from stages.rl.weights import WeightsPublisher, export_policy
from stages.scoring.protocol import Scorer

logger = logging.getLogger(__name__)

MAX_EMPTY_ROLLOUTS = 10
"""Rollouts in a row without anything to learn from (all scores equal) before the run gives up."""


@dataclass(frozen=True)
class Parts:
    """What the loop drives; made by `train.py`."""

    generator: Generator
    scorer: Scorer
    missing_eos_score: float
    learner: Learner
    reference: Reference
    publisher: WeightsPublisher
    algorithm: Algorithm
    train_prompts: list[Request]
    validation_prompts: list[Request]


@dataclass
class Progress:
    """What a resume needs besides the learner."""

    num_rollouts: int = 0
    num_samples: int = 0
    first: Evaluation | None = None
    best: Evaluation | None = None
    last: Evaluation | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall-clock seconds by phase, over all resumes."""

    @contextmanager
    def clock(self, phase: str) -> Iterator[None]:
        """Add the block's time to a phase."""
        started = time.monotonic()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - started

    def to_state(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Progress":
        """From what `to_state` gave."""
        evaluations = {name: Evaluation(**state[name]) if state[name] else None for name in ("first", "best", "last")}
        return cls(**{**state, **evaluations})


class Loop:
    """Runs all updates that are still to do, from the newest checkpoint in `workdir`."""

    def __init__(
        self,
        parts: Parts,
        config: RlConfig,
        generation: GenerationConfig,
        workdir: Path,
        log_metrics: Callable[[dict[str, float], int], None],
    ) -> None:
        self._parts = parts
        self._config = config
        self._temperature = generation.temperature
        self._workdir = workdir
        self._log_metrics = log_metrics
        self.progress = Progress()

    def run(self) -> None:
        """Train to the last update; the best version lies in `best_directory`, the last one is published."""
        learner = self._parts.learner
        self._resume()
        for _ in progress(range(learner.updates, self._config.num_updates), "RL", unit="update"):
            with self.progress.clock("wall_s"):
                metrics = self._update()
                self._publish()
                is_last = learner.updates == self._config.num_updates
                if learner.updates % self._config.eval_every == 0 or is_last:
                    metrics |= self._evaluate()
            self._log(metrics)
            if learner.updates % self._config.checkpoint_every == 0 and not is_last:
                self._checkpoint()

    @property
    def best_directory(self) -> Path:
        """Model directory of the best version so far."""
        assert self.progress.best is not None
        return self._workdir / f"best-v{self.progress.best.policy_version}"

    def _resume(self) -> None:
        found = find_checkpoint(self._workdir)
        if found:
            path, state = found
            self._parts.learner.load(path)
            self.progress = Progress.from_state(state)
            logger.info("resumed policy_version=%d", self._parts.learner.updates)
        self._publish()
        if self.progress.first is None:
            with self.progress.clock("wall_s"):
                metrics = self._evaluate()
            self._log_metrics({name: mean.value for name, mean in metrics.items()}, 0)

    def _update(self) -> dict[str, Mean]:
        """Roll out until there is something to learn from, then make one update."""
        for _ in range(MAX_EMPTY_ROLLOUTS):
            metrics = self._try_update()
            if metrics is not None:
                return metrics
            logger.warning("all scores are equal, nothing to learn rollout=%d", self.progress.num_rollouts)
        raise RunError(
            f"{MAX_EMPTY_ROLLOUTS} rollouts in a row had equal scores for every prompt: the reward model does not "
            "tell the policy's completions apart"
        )

    def _try_update(self) -> dict[str, Mean] | None:
        parts, state = self._parts, self.progress
        prompts = select_prompts(
            parts.train_prompts, state.num_rollouts, self._config.prompts_per_update, self._config.seed
        )
        with state.clock("generate_s"):
            plan = SamplingPlan(parts.algorithm.num_samples, parts.algorithm.with_greedy)
            groups = parts.generator.generate(prompts, plan)
        completions = [completion for group in groups for completion in group]
        with state.clock("score_s"):
            scores = score_completions(parts.scorer, completions, parts.missing_eos_score)
        state.num_rollouts += 1
        state.num_samples += len(completions)
        units, selection_metrics = parts.algorithm.select(build_rollout(groups, scores))
        if not units:
            return None
        with state.clock("learn_s"):
            reference = parts.reference if parts.algorithm.needs_reference else None
            max_tokens = self._config.learner.micro_batch_tokens
            micro_batches = build_micro_batches(completions, units, reference, max_tokens)
            loss = functools.partial(
                compute_loss, algorithm=parts.algorithm, num_units=len(units), temperature=self._temperature
            )
            metrics = parts.learner.update(micro_batches, loss)
        self._check_gap(metrics["learner/sampling_logprob_gap"].value)
        return metrics | selection_metrics | describe_rollout(groups, scores)

    def _check_gap(self, gap: float) -> None:
        if not gap <= self._config.max_logprob_gap:
            raise RunError(
                f"the generator's logprobs differ from the learner's by {gap:.3f} nats a token on average, above "
                f"rl.max_logprob_gap={self._config.max_logprob_gap}: it does not sample from the published weights"
            )

    def _publish(self) -> None:
        with self.progress.clock("publish_s"):
            version = self._parts.learner.updates
            directory = self._parts.publisher.write(self._parts.learner.model, version)
            self._parts.generator.publish(directory, version)

    def _evaluate(self) -> dict[str, Mean]:
        parts, state = self._parts, self.progress
        with state.clock("evaluate_s"):
            groups = parts.generator.generate(parts.validation_prompts, SamplingPlan(1))
            completions = [completion for group in groups for completion in group]
            scores = score_completions(parts.scorer, completions, parts.missing_eos_score)
            max_tokens = self._config.learner.micro_batch_tokens
            evaluation = Evaluation(
                policy_version=parts.learner.updates,
                score=sum(scores) / len(scores),
                kl_nats=estimate_kl(parts.learner.model, parts.reference, completions, max_tokens),
                completion_tokens=sum(len(item.token_ids) for item in completions) / len(completions),
                finished_fraction=sum(item.is_finished for item in completions) / len(completions),
            )
            state.first = state.first or evaluation
            state.last = evaluation
            if is_better(evaluation, state.best, self._config.max_kl_nats):
                state.best = evaluation
                self._keep_best()
        logger.info(
            "evaluation policy_version=%d score=%.3f kl_nats=%.2f completion_tokens=%.1f",
            *(evaluation.policy_version, evaluation.score, evaluation.kl_nats, evaluation.completion_tokens),
        )
        values = asdict(evaluation)
        names = ("score", "kl_nats", "completion_tokens", "finished_fraction")
        return {f"eval/{name}": Mean(values[name], 1) for name in names}

    def _keep_best(self) -> None:
        shutil.rmtree(self.best_directory, ignore_errors=True)
        export_policy(self._parts.publisher.current, self.best_directory)

    def _checkpoint(self) -> None:
        commit_checkpoint(self._workdir, self._parts.learner.save, self.progress.to_state())
        for older in self._workdir.glob("best-v*"):  # the committed state names the only one still needed
            if older != self.best_directory:
                shutil.rmtree(older)

    def _log(self, metrics: dict[str, Mean]) -> None:
        version = self._parts.learner.updates
        values = {name: mean.value for name, mean in metrics.items()}
        values |= {f"time/{phase}": seconds for phase, seconds in self.progress.seconds.items()}
        values["time/elapsed_s"] = self.progress.seconds["wall_s"]
        values |= {"learner/policy_version": version, "rollout/completions_total": self.progress.num_samples}
        self._log_metrics(values, version)
        logger.info(
            "update=%d/%d loss=%.4f score=%.3f gap=%.3f",
            *(version, self._config.num_updates, values["learner/loss"], values["reward/score"]),
            values["learner/sampling_logprob_gap"],
        )
