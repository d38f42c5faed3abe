"""Training from a recorded ledger, without a generator: the same updates, bit for bit, on the same machine.

Samples, scores, advantages and reference log-probabilities come from the ledger, in the recorded order of
micro-batches; so does the choice of the best version, as evaluating would need a generator.
"""

from pathlib import Path

from stages.common.errors import InputError
from stages.rl.ledger.reader import LedgerReader, read_ledger
from stages.rl.ledger.schema import LedgerHeader
from stages.rl.ledger.writer import require_same
from stages.rl.mini_batch import rebuild_mini_batch
from stages.rl.progress import Progress
from stages.rl.training import Training
from stages.rl.validation import Evaluation


def open_recording(path: Path, header: LedgerHeader) -> LedgerReader:
    """The ledger to replay.

    Args:
        path: of the ledger.
        header: what this run's own ledger would say.

    Raises:
        InputError: it is not readable, was recorded with other settings, prompts or weights, or is not complete.
    """
    recording = read_ledger(path)
    require_same(path, header)
    num_updates = sum(1 for _ in recording.updates(with_logprobs=False))
    if num_updates != header.num_updates:
        raise InputError(f"{path}: holds {num_updates} of rl.num_updates={header.num_updates} updates")
    return recording


def replay(recording: LedgerReader, training: Training, progress: Progress) -> None:
    """Make every recorded update, from version 0 to the last.

    Args:
        recording: from `open_recording`.
        training: the learner at version 0; its scorer is not used, its reference model only by a loss
            that needs whole distributions.
        progress: is filled as the recorded run filled its own.
    """
    evaluations = {
        event.policy_version: Evaluation.from_json(event.detail)
        for event in recording.events
        if event.kind == "evaluated" and event.detail is not None
    }
    progress.num_samples = sum(1 for _ in recording.samples())
    counts = {"rollout/completions_total": float(progress.num_samples), "rollout/dropped_total": 0.0}
    counts["rollout/dropped_total"] = sum(event.kind in ("lost", "dropped", "discarded") for event in recording.events)
    training.note_evaluation(evaluations[0], progress)
    for recorded in recording.updates():
        mini_batch = rebuild_mini_batch(recorded, recording, training.preparation)
        staleness = [row.staleness for row in recorded.rows]
        progress.staleness.update(staleness)
        metrics = training.train(mini_batch, staleness)
        if training.learner.updates in evaluations:
            metrics |= training.note_evaluation(evaluations[training.learner.updates], progress)
        training.log(metrics, counts, recording.header.num_updates)
