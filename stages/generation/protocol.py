"""What a generator is: prompts as token ids in, completions as token ids out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from stages.common.errors import GeneratorError
from stages.data.records import Completion

Group = tuple[Completion, ...]
"""All completions of one prompt: its samples in order, then the greedy one if it was asked for."""


@dataclass(frozen=True)
class Request:
    """One prompt to sample from."""

    prompt_id: str
    prompt_ids: tuple[int, ...]
    seed: int
    """Sample k uses seed + k, so a prompt's samples do not depend on what else is in the batch."""


@dataclass(frozen=True)
class SamplingPlan:
    """What is wanted of each prompt; an algorithm says it."""

    num_samples: int
    with_greedy: bool = False
    """Also the most likely continuation (ReMax's baseline), sent together with the samples."""


class Generator(Protocol):
    """Samples completions from the newest published weights."""

    def generate(self, requests: Sequence[Request], plan: SamplingPlan) -> list[Group]:
        """One group per request, in order.

        Raises:
            GeneratorError: the generator died, timed out, or answered something unusable.
        """

    def publish(self, weights: Path, policy_version: int) -> None:
        """Swap in the weights of a model directory; later completions carry `policy_version`."""

    def close(self) -> None:
        """End it and everything it started. May be called twice."""


def require_complete(group: Group, request: Request, plan: SamplingPlan, max_new_tokens: int) -> Group:
    """Refuse an answer that is not what was asked for, before anything is trained on it.

    Raises:
        GeneratorError: wrong number of completions, wrong length, or a logprob that is not one.
    """
    wanted = plan.num_samples + int(plan.with_greedy)
    if len(group) != wanted:
        raise GeneratorError(f"prompt {request.prompt_id}: {len(group)} completions instead of {wanted}")
    for completion in group:
        num_tokens, num_logprobs = len(completion.token_ids), len(completion.sampling_logprobs)
        if not 1 <= num_tokens <= max_new_tokens or num_tokens != num_logprobs:
            raise GeneratorError(
                f"prompt {request.prompt_id}: {num_tokens} tokens and {num_logprobs} logprobs; "
                f"expected 1…{max_new_tokens} of each"
            )
        if not all(-float("inf") < logprob <= 1e-3 for logprob in completion.sampling_logprobs):
            raise GeneratorError(f"prompt {request.prompt_id}: a logprob is not a finite number ≤ 0")
    return group
