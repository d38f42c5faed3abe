"""What an algorithm is: which completions it wants, which it trains on, and their loss."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor

from stages.common.metrics import Mean
from stages.rl.records import LossInputs, Predictions, Rollout, Totals, Unit


class Algorithm(ABC):
    """Settings and pure functions; it holds no state."""

    @property
    @abstractmethod
    def num_samples(self) -> int:
        """K, completions sampled for each prompt."""

    @property
    def with_greedy(self) -> bool:
        """True if it also needs each prompt's greedy completion."""
        return False

    @property
    def greedy_max_tokens(self) -> int | None:
        """Tokens at which the greedy completion is cut; None: where samples are."""
        return None

    @property
    def needs_reference(self) -> bool:
        """True if it reads the reference's log-probabilities of the sampled tokens."""
        return False

    @property
    def needs_exact_kl(self) -> bool:
        """True if its loss reads the KL of whole distributions, for which the reference must be at hand."""
        return False

    @property
    def needs_proximal(self) -> bool:
        """True if its loss reads what the learner's log-probabilities were before it trained on the mini-batch."""
        return False

    @property
    def value_model(self) -> "ValueLoss | None":
        """Its value model's loss; None if it needs no value model."""
        return None

    @abstractmethod
    def select(self, rollout: Rollout) -> tuple[list[Unit], dict[str, Mean]]:
        """Completions to train on, with advantages from their scores or as pairs; and metrics."""

    def compute_advantages(self, inputs: LossInputs) -> tuple[LossInputs, dict[str, Mean]]:
        """Advantages that need more than scores; called once, with all rows of the mini-batch. Metrics besides."""
        return inputs, {}

    def find_trouble(self, metrics: Mapping[str, Mean]) -> str | None:  # noqa: ARG002  some read it
        """What an update's metrics say against the algorithm or its settings, in one line."""
        return None

    @abstractmethod
    def compute_loss(
        self, predictions: Predictions, inputs: LossInputs, totals: Totals
    ) -> tuple[Tensor, dict[str, Mean]]:
        """Loss of one micro-batch; over all micro-batches and ranks the shares add up to the batch's.

        Args:
            predictions: the learner's.
            inputs: of the same completions.
            totals: of the whole batch over all ranks: the normalisers.
        """


class ValueLoss(ABC):
    """How a value model learns."""

    @abstractmethod
    def compute_loss(self, values: Tensor, inputs: LossInputs, totals: Totals) -> tuple[Tensor, dict[str, Mean]]:
        """Loss of one micro-batch, as `Algorithm.compute_loss`.

        Args:
            values: the value model's, with gradient: of the state before each completion token. [B, T]
            inputs: of the same completions, with `values` and `returns`.
            totals: of the whole batch over all ranks.
        """
