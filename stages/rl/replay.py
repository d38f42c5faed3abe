"""Training from a recorded ledger, without a generator: the same updates, bit for bit, on the same machine.

Samples, scores, advantages and reference log-probabilities come from the ledger, in the recorded order of
micro-batches; so does the choice of the best version, as evaluating would need a generator. Proximal
log-probabilities and values are the learner's own: with other settings it is another one than was recorded.
"""

from collections import Counter
from pathlib import Path

from stages.common.errors import InputError
from stages.rl.ledger.reader import LedgerReader, read_ledger
from stages.rl.ledger.schema import LedgerHeader
from stages.rl.ledger.writer import require_same
from stages.rl.mini_batch import MiniBatch, rebuild_mini_batch
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


def replay(recording: LedgerReader, training: Training, progress: Progress) -> dict[str, int]:
    """Make every recorded update, from version 0 to the last; how many attempts the recorded run dropped, by reason.

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
    dropped = [event for event in recording.events if event.kind in ("lost", "dropped", "discarded")]
    training.note_evaluation(evaluations[0], progress)
    rollout: list[MiniBatch] = []
    num_trained = 0
    for recorded in recording.updates():
        number, is_new = _find_place(recorded.update, recording.header)
        if is_new:
            del rollout[number:]
            rollout.append(rebuild_mini_batch(recorded, recording, training.preparation, is_resumed=False))
            num_trained += len({(row.key, row.sample_index, row.is_greedy) for row in recorded.rows})
        mini_batch = rollout[number]
        counts = {
            "rollout/completions_total": float(num_trained),
            "rollout/dropped_total": float(sum(event.update <= recorded.update for event in dropped)),
        }
        staleness = [row.staleness for row in recorded.rows]
        progress.staleness.update(staleness)
        metrics = training.train(mini_batch, staleness)
        if training.learner.updates in evaluations:
            metrics |= training.note_evaluation(evaluations[training.learner.updates], progress)
        training.log(metrics, counts, recording.header.num_updates)
    return dict(Counter(event.reason for event in dropped if event.reason is not None))


def _find_place(update: int, header: LedgerHeader) -> tuple[int, bool]:
    """Which of its rollout's mini-batches an update trains, and whether for the first time."""
    place = update % (header.updates_per_rollout * header.epochs_per_rollout)
    return place % header.updates_per_rollout, place < header.updates_per_rollout
