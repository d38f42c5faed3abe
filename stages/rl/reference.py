"""The reference: loaded only for as long as something reads it."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from stages.learner.config import LearnerConfig
from stages.learner.frozen import load_frozen_policy
from stages.learner.ranks import Ranks
from stages.rl.algorithms.protocol import Algorithm
from stages.rl.rollouts import Reference


def reads_reference(algorithm: Algorithm, *, are_recorded: bool) -> bool:
    """Whether an algorithm reads the reference in the learner's updates; evaluations can borrow it.

    Args:
        algorithm: with its KL coefficients.
        are_recorded: samples bring the reference's log-probabilities, but not its whole distributions: from a ledger
            that is replayed, or from the process on the generator's devices.
    """
    return algorithm.needs_exact_kl or (algorithm.needs_reference and not are_recorded)


@dataclass(frozen=True)
class ReferenceSource:
    """Where the reference comes from when it is needed."""

    ranks: Ranks
    sft: Path
    """The frozen SFT model."""
    policy: Reference
    """The learner as it is."""
    config: LearnerConfig
    """The learner's: where the weights lie. Without its adapters it is the SFT model: nothing has to be loaded."""

    @property
    def with_adapters(self) -> bool:
        """Whether the learner has adapters, which can be switched off."""
        return self.config.lora is not None

    def load(self) -> Reference:
        """The reference for good, for algorithms that read it."""
        if self.with_adapters:
            return replace(self.policy, is_without_adapters=True)
        # Same weights, same types, same code path as the learner: KL is exactly 0 before the first update.
        model = self.ranks.make_frozen(functools.partial(load_frozen_policy, self.sft, self.config))
        return replace(self.policy, model=model)

    @contextmanager
    def borrow(self, loaded: Reference | None) -> Iterator[Reference]:
        """The reference for a moment: the loaded one, or one that is gone again when this closes."""
        reference = loaded or self.load()
        try:
            yield reference
        finally:
            if loaded is None and not self.with_adapters:
                self.ranks.drop(reference.model)
