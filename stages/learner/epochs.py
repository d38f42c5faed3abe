"""Training over a fixed data set for some epochs, with checkpoints and exact resume (SFT, reward model)."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from stages.common.metrics import Mean
from stages.common.progress import progress
from stages.data.batches import length_grouped_batches
from stages.learner.checkpoint import commit_checkpoint, find_checkpoint
from stages.learner.engine import Learner, LossFunction

logger = logging.getLogger(__name__)

ExampleT = TypeVar("ExampleT")
BatchT = TypeVar("BatchT")
LogMetrics = Callable[[dict[str, float], int], None]


@dataclass(frozen=True)
class Epochs(Generic[ExampleT, BatchT]):
    """What to train on and how it is cut."""

    examples: Sequence[ExampleT]
    lengths: Sequence[int]
    """Tokens of each example, for batches of similar length."""
    batch_size: int
    """Examples per update."""
    num_epochs: int
    seed: int
    split: Callable[[list[ExampleT]], list[BatchT]]
    """A batch of examples -> micro-batches."""
    checkpoint_every: int
    """Updates between checkpoints."""

    def batches(self) -> Iterator[list[int]]:
        """Indices of every update's examples, the same on each call."""
        for epoch in range(self.num_epochs):
            yield from length_grouped_batches(self.lengths, self.batch_size, self.seed + epoch)

    @property
    def total_updates(self) -> int:
        """Updates of the whole run; the last batch of an epoch may be smaller."""
        return self.num_epochs * -(-len(self.examples) // self.batch_size)


def train_epochs(
    learner: Learner,
    epochs: Epochs[ExampleT, BatchT],
    loss_function: Callable[[list[ExampleT]], LossFunction[BatchT]],
    workdir: Path,
    log_metrics: LogMetrics,
) -> None:
    """Run every update that is still to do; a run resumed at k equals one that never stopped.

    Args:
        learner: fresh; a checkpoint in `workdir` is loaded into it.
        epochs: data, batch size, order.
        loss_function: examples of the whole batch (which normalise) -> loss of one of its micro-batches.
        workdir: where checkpoints lie.
        log_metrics: called once per update with the metrics and the update's number.
    """
    found = find_checkpoint(workdir)
    if found:
        learner.load(found[0])
        logger.info("resumed update=%d of=%d", learner.updates, epochs.total_updates)
    remaining = list(epochs.batches())[learner.updates :]
    for indices in progress(remaining, "updates", unit="update"):
        started = time.monotonic()
        examples = [epochs.examples[index] for index in indices]
        metrics = learner.update(epochs.split(examples), loss_function(examples))
        metrics["time/update_s"] = Mean(time.monotonic() - started, 1)
        values = {name: mean.value for name, mean in metrics.items()}
        log_metrics(values, learner.updates)
        logger.info("update=%d/%d loss=%.4f", learner.updates, epochs.total_updates, values["learner/loss"])
        if learner.updates % epochs.checkpoint_every == 0 and learner.updates < epochs.total_updates:
            commit_checkpoint(workdir, learner.save, {"updates": learner.updates})
