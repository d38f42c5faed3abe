"""What an algorithm is: which completions it wants, which it trains on, and their loss."""

from typing import Protocol

from torch import Tensor

from stages.common.metrics import Mean
from stages.rl.records import LossInputs, Rollout, Unit


class Algorithm(Protocol):
    """Settings and pure functions; it holds no state."""

    @property
    def num_samples(self) -> int:
        """K, completions sampled for each prompt."""

    @property
    def with_greedy(self) -> bool:
        """True if it also needs each prompt's greedy completion."""

    @property
    def needs_reference(self) -> bool:
        """True if its loss reads the reference's log-probabilities."""

    @property
    def needs_proximal(self) -> bool:
        """True if its loss reads what the learner's log-probabilities were before it trained on the mini-batch."""

    @property
    def needs_value_model(self) -> bool:
        """True if it needs a value model."""

    def select(self, rollout: Rollout) -> tuple[list[Unit], dict[str, Mean]]:
        """Completions to train on, with their advantages or as pairs; and metrics."""

    def compute_loss(self, logprobs: Tensor, inputs: LossInputs, *, num_units: int) -> tuple[Tensor, dict[str, Mean]]:
        """Loss of one micro-batch; over all micro-batches and ranks the shares add up to the batch's.

        Args:
            logprobs: the learner's, in nats, with gradient. [B, T]
            inputs: of the same completions.
            num_units: units in the whole batch over all ranks: the normaliser.
        """
