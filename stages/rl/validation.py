"""Evaluation during training on validation prompts, and which checkpoint is the best one.

The reward model is all it sees: the gold scorer is kept for the held-out prompts of the final evaluation.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from stages.data.batches import collate, split_by_tokens
from stages.data.records import Completion
from stages.data.text import TokenSequence
from stages.learner.ranks import ALONE, Ranks
from stages.models.load import select_device
from stages.rl.rollouts import Reference

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """One policy version on the validation prompts."""

    policy_version: int
    score: float
    """Mean proxy score, the missing-EOS rule applied."""
    kl_nats: float
    """Mean KL to the reference per completion, k1 estimate on the policy's own samples."""
    completion_tokens: float
    """Mean length."""
    finished_fraction: float

    def to_json(self) -> str:
        """As the ledger records it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Evaluation":
        """From what `to_json` gave."""
        return cls(**json.loads(text))


def is_better(candidate: Evaluation, best: Evaluation | None, max_kl_nats: float) -> bool:
    """Higher proxy score within the KL limit. Version 0 has KL 0, so there always is a best one."""
    if not candidate.kl_nats <= max_kl_nats:  # nor if it is not a number
        return False
    return best is None or candidate.score > best.score


def estimate_kl(
    policy: Reference, reference: Reference, completions: Sequence[Completion], max_tokens: int, ranks: Ranks = ALONE
) -> float:
    """Mean over completions of the summed log π − log π_ref, in nats.

    Args:
        policy: the learner as it is.
        reference: the frozen SFT model.
        completions: the policy's own.
        max_tokens: padded tokens of a micro-batch.
        ranks: that have both models.
    """
    sequences = [TokenSequence(item.prompt_ids, item.token_ids) for item in completions]
    groups = split_by_tokens([len(sequence) for sequence in sequences], max_tokens, ranks.size)
    batches = [collate([sequences[index] for index in group], select_device()) for group in groups]
    batches = reference.read_trunks(batches)
    pairs = zip(ranks.map(policy.compute, batches), ranks.map(reference.compute, batches), strict=True)
    return sum(float((logprobs - other).sum()) for logprobs, other in pairs) / len(sequences)
