"""The learner's loop: wait for a mini-batch, train, publish; the generators sample the next ones meanwhile.

    prompts ─► sampling.py ─► generators ─► inbox.py ─► mini_batch.py ─► learner ─► weights.py ─► generators
               staleness.py says who may be sampled and trained; ledger/ records it; timeline.py says who did what when

A checkpoint holds the learner, its optimizer, what is out with the generators, finished groups (in the ledger), the
best evaluation, the clock and the ledger's offset. With `drain` it waits until only the newest weights have work
to do, so that a resumed run samples every group by the weights that would have sampled it.
"""

import logging
import shutil
from dataclasses import dataclass
from typing import Any

from stages.common.errors import RunError
from stages.common.metrics import Mean
from stages.generation.protocol import Request
from stages.learner.checkpoint import commit_checkpoint
from stages.rl.config import RlConfig
from stages.rl.ledger.reader import read_ledger
from stages.rl.ledger.schema import Event
from stages.rl.ledger.writer import Ledger
from stages.rl.mini_batch import MiniBatch, rebuild_mini_batch
from stages.rl.progress import Progress
from stages.rl.sampling import Sampling
from stages.rl.stopping import StopRequested, StopSignals
from stages.rl.timeline import LEARNER
from stages.rl.training import Training
from stages.rl.validation import Evaluation
from stages.rl.weights import Publisher

logger = logging.getLogger(__name__)

MAX_EMPTY_BATCHES = 10
"""Mini-batches in a row without anything to learn from (all scores equal, no greedy score) before the run gives up."""


@dataclass(frozen=True)
class LoopParts:
    """What the loop drives besides the learner; made by `train.py`."""

    sampling: Sampling
    publisher: Publisher
    ledger: Ledger
    stop: StopSignals
    validation_prompts: list[Request]


class Loop:
    """Runs all updates that are still to do.

    Args:
        training: the learner and what surrounds it, at the checkpoint's state if the run is resumed.
        parts: generators' side, ledger.
        config: section `rl`.
        progress: of the run so far.
    """

    def __init__(self, training: Training, parts: LoopParts, config: RlConfig, progress: Progress) -> None:
        self._training = training
        self._parts = parts
        self._config = config
        self._rule = config.rule
        self._progress = progress
        self._rollout: list[MiniBatch] = []

    def run(self) -> None:
        """Train to the last update.

        Raises:
            GeneratorError, RunError, NonFiniteLossError: the run cannot go on; its last checkpoint is kept.
            KeyboardInterrupt, SystemExit: it was asked to stop, and has a checkpoint of this very update.
        """
        learner = self._training.learner
        try:
            if self._progress.first is None:
                self._log_evaluation(self._request(is_evaluated=True))
            else:
                self._reload_rollout()
                if self._is_evaluated() and self._progress.last_version < learner.updates:
                    self._log_evaluation(self._request(is_evaluated=True))  # the run was stopped while it evaluated
            while learner.updates < self._config.num_updates:
                self._step()
                if self._is_checkpointed():
                    self._checkpoint()
                self._parts.stop.check()
        except StopRequested:
            if self._progress.first is not None:
                self._checkpoint()
            self._parts.stop.leave()

    def publish(self) -> None:
        """Hand the learner's weights to the generators, which load them while the learner goes on."""
        training, version = self._training, self._training.learner.updates
        with training.timeline.span(LEARNER, "publish", version):
            self._parts.sampling.publish(self._parts.publisher.write(training.learner, version))

    def _step(self) -> None:
        """One update and what follows from it."""
        parts, version = self._parts, self._training.learner.updates
        mini_batch = self._next_mini_batch(version)
        rows = mini_batch.rows_of(version, epoch=version % self._rule.cycle // self._rule.updates_per_rollout)
        staleness = [row.staleness for row in rows]
        metrics = self._training.train(mini_batch, staleness)
        parts.ledger.add_update(rows)
        self._progress.staleness.update(staleness)
        self._check_gap(metrics)
        try:
            metrics |= self._publish_and_evaluate()
            with self._training.timeline.span(LEARNER, "record", version):
                parts.ledger.flush()
        finally:  # the update is made, whatever ends the wait for its evaluation
            self._training.log(metrics, self._counts(), self._config.num_updates)

    def _log_evaluation(self, metrics: dict[str, Mean]) -> None:
        values = {name: mean.value for name, mean in metrics.items()}
        self._training.log_metrics(values, self._training.learner.updates)

    def _next_mini_batch(self, version: int) -> MiniBatch:
        """A new one in a rollout's first epoch, the same again in later ones."""
        place = version % self._rule.cycle
        if place == 0:
            self._rollout.clear()
        if place >= self._rule.updates_per_rollout:
            return self._rollout[place % self._rule.updates_per_rollout]
        self._rollout.append(self._sample_mini_batch(version, version // self._rule.cycle, place))
        return self._rollout[-1]

    def _sample_mini_batch(self, version: int, rollout: int, number: int) -> MiniBatch:
        sampling, timeline = self._parts.sampling, self._training.timeline
        preparation = self._training.preparation
        for _ in range(MAX_EMPTY_BATCHES):
            with timeline.span(LEARNER, "wait", version):
                sampled = sampling.take(version)
            with timeline.span(LEARNER, "score", version):
                scores = preparation.score(sampled)
            with timeline.span(LEARNER, "reference", version):
                mini_batch = preparation.prepare(sampled, scores, (version, rollout, number))
            if mini_batch is not None:
                return mini_batch
            logger.warning("nothing to learn from these prompts, others are sampled update=%d", version)
            if sampling.published < version:
                self.publish()  # a run that was stopped here has no older weights to sample the others by
            sampling.discard(sampled, version, "no_signal")
        raise RunError(
            f"{MAX_EMPTY_BATCHES} mini-batches in a row gave nothing to learn from: the reward model does not tell the "
            "policy's completions apart, or (ReMax) no greedy completion has a finite score"
        )

    def _check_gap(self, metrics: dict[str, Mean]) -> None:
        """On fresh samples the generator's log-probabilities must be the learner's; others are left to the probe."""
        gap = metrics["learner/sampling_logprob_gap"].value
        if metrics["rollout/staleness/max"].value == 0 and not gap <= self._config.max_logprob_gap:
            raise RunError(
                f"the generator's logprobs differ from the learner's by {gap:.3f} nats a token on average, above "
                f"rl.max_logprob_gap={self._config.max_logprob_gap}: it does not sample from the published weights"
            )

    def _publish_and_evaluate(self) -> dict[str, Mean]:
        version, is_evaluated = self._training.learner.updates, self._is_evaluated()
        # At a checkpoint too: a resumed run can only sample by the checkpoint's own weights.
        if not (is_evaluated or self._is_checkpointed() or self._rule.opens(version)):
            return {}
        self.publish()
        return self._request(is_evaluated=is_evaluated)

    def _is_evaluated(self) -> bool:
        version = self._training.learner.updates
        return version % self._config.eval_every == 0 or version == self._config.num_updates

    def _is_checkpointed(self) -> bool:
        return self._training.learner.updates % self._config.checkpoint_every == 0

    def _request(self, *, is_evaluated: bool) -> dict[str, Mean]:
        """Send off what the published weights may sample, the validation prompts before it."""
        parts = self._parts
        if is_evaluated:
            parts.sampling.request_evaluation(parts.validation_prompts)
        parts.sampling.request()
        return self._evaluate() if is_evaluated else {}

    def _evaluate(self) -> dict[str, Mean]:
        """Score the published weights on the validation prompts; training prompts are sampled meanwhile."""
        training, version = self._training, self._training.learner.updates
        with training.timeline.span(LEARNER, "wait", version):
            sampled = self._parts.sampling.take_evaluation(len(self._parts.validation_prompts), version)
        with training.timeline.span(LEARNER, "evaluate", version):
            completions = [completion for item in sampled for completion in item.group]
            scores = training.preparation.score(sampled)
            evaluation = Evaluation(
                policy_version=version,
                score=sum(scores) / len(scores),
                kl_nats=training.estimate_kl(completions),
                completion_tokens=sum(len(item.token_ids) for item in completions) / len(completions),
                finished_fraction=sum(item.is_finished for item in completions) / len(completions),
            )
            detail = evaluation.to_json()
            self._parts.ledger.add_event(Event("evaluated", update=version, policy_version=version, detail=detail))
            return training.note_evaluation(evaluation, self._progress)

    def _checkpoint(self) -> None:
        training, parts, version = self._training, self._parts, self._training.learner.updates
        if self._config.weight_update == "drain":
            with training.timeline.span(LEARNER, "wait", version):
                parts.sampling.settle(version)
        with training.timeline.span(LEARNER, "checkpoint", version):
            self._progress.num_samples = parts.sampling.num_samples
            state: dict[str, Any] = {
                "progress": self._progress.to_state(),
                "sampling": parts.sampling.state(),
                "ledger_offset": parts.ledger.flush(),
                "timeline": training.timeline.state(),
            }
            commit_checkpoint(training.workdir, training.save, state)
            best = training.best_directory(self._progress)
            for older in training.workdir.glob("best-v*"):  # the committed state names the only one still needed
                if older != best:
                    shutil.rmtree(older)

    def _reload_rollout(self) -> None:
        """The mini-batches of the rollout that was in training, for its later epochs."""
        version = self._training.learner.updates
        first = version - version % self._rule.cycle
        wanted = range(first, min(version, first + self._rule.updates_per_rollout))
        ledger = read_ledger(self._parts.ledger.path)
        for recorded in ledger.updates() if wanted else ():
            if recorded.update in wanted:
                self._rollout.append(rebuild_mini_batch(recorded, ledger, self._training.preparation, is_resumed=True))

    def _counts(self) -> dict[str, float]:
        sampling = self._parts.sampling
        return {
            "rollout/completions_total": sampling.num_samples,
            "rollout/dropped_total": sum(sampling.dropped.values()),
        }
