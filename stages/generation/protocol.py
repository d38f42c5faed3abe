"""What a generator is: prompts as token ids in, completions as token ids out, while its owner does other things."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from stages.common.errors import GeneratorError
from stages.common.progress import progress
from stages.data.records import Completion

if TYPE_CHECKING:
    from torch import Tensor

Group = tuple[Completion, ...]
"""All completions of one prompt: its samples in order, then the greedy one if it was asked for."""
LEAST_LOGPROB = -1000.0
"""Of a token that was sampled, which has a probability; vLLM's servers send -9999 in the place of NaN and -inf."""


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
    greedy_max_tokens: int | None = None
    """Tokens at which the greedy completion is cut; None, or more than a completion may have: where samples are."""

    @property
    def num_completions(self) -> int:
        """Completions of a prompt."""
        return self.num_samples + int(self.with_greedy)

    def max_tokens(self, max_new_tokens: int, *, greedy: bool) -> int:
        """Tokens a completion may have, where samples may have `max_new_tokens`."""
        return min(max_new_tokens, self.greedy_max_tokens or max_new_tokens) if greedy else max_new_tokens


@dataclass(frozen=True)
class Ticket:
    """A numbered prompt that is sent off; sent again it keeps its number."""

    number: int
    request: Request
    plan: SamplingPlan
    attempt: int = 0


@dataclass(frozen=True)
class Probe:
    """A text whose log-probabilities show which weights a server really has."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """The learner's for every token but the first, at temperature 1, in nats."""
    max_gap: float = 0.3
    """Largest mean difference from a server's, in nats a token. bf16 kernels that differ give 0.03–0.05."""


@dataclass(frozen=True)
class WeightsUpdate:
    """Weights to sample from."""

    policy_version: int
    path: Path | None
    """A safetensors file with the tensors that differ from the generator's first weights, or a model directory; None:
    they are in `tensors`."""
    probe: Probe | None = None
    is_temporary: bool = False
    """True if the generator deletes `path` once it has no more use for it."""
    tensors: "Mapping[str, Tensor] | None" = field(default=None, compare=False, repr=False)
    """A copy on the learner's device that nobody writes into, for servers that read no files; see transfer.py."""


@dataclass(frozen=True)
class Finished:
    """A ticket's group is complete."""

    ticket: Ticket
    group: Group
    replica: str


@dataclass(frozen=True)
class Lost:
    """An attempt gave nothing usable; the generator sends the ticket off again as the next attempt."""

    ticket: Ticket
    reason: str
    """replica_lost, timeout, unusable_answer."""
    detail: str
    """One line for people."""


@dataclass(frozen=True)
class Published:
    """A replica samples from new weights."""

    policy_version: int
    replica: str
    seconds: float
    """From the moment the replica stopped sampling until it could go on, the probe included."""


Event = Finished | Lost | Published
RecordSpan = Callable[[str, str, float, float, int], None]
"""(role, kind, started, ended, policy_version); times of `time.monotonic`."""


class Generator(Protocol):
    """Samples completions from the newest published weights, in the background.

    What is submitted before a publication is sampled by the older weights, what comes after it by the newer ones;
    in the mode `in_flight` a publication overtakes what was submitted before.
    """

    def submit(self, ticket: Ticket) -> None:
        """Ask for a group; returns at once."""

    def publish(self, update: WeightsUpdate) -> None:
        """Swap weights; returns at once."""

    def wait(self, timeout_s: float) -> list[Event]:
        """What has happened since the last call; waits for something to happen, at most so long.

        Raises:
            GeneratorError: the generator cannot go on.
        """

    def close(self) -> None:
        """End it and everything it started. May be called twice."""


def generate(
    generator: Generator, requests: Sequence[Request], plan: SamplingPlan, stall_timeout_s: float = 3600
) -> list[Group]:
    """Send all prompts off and wait for their groups, in the order of the prompts.

    Raises:
        GeneratorError: the generator cannot go on, or nothing happened for `stall_timeout_s`.
    """
    for number, request in enumerate(requests):
        generator.submit(Ticket(number, request, plan))
    finished = _wait_for_groups(generator, len(requests), stall_timeout_s)
    groups: dict[int, Group] = {}
    for _ in progress(len(requests), "sampling", unit="prompt"):
        event = next(finished)
        groups[event.ticket.number] = event.group
    return [groups[number] for number in range(len(requests))]


def _wait_for_groups(generator: Generator, num_missing: int, stall_timeout_s: float) -> Iterator[Finished]:
    """Groups as they come."""
    last_event = time.monotonic()
    while num_missing:
        events = generator.wait(timeout_s=1.0)
        if events:
            last_event = time.monotonic()
        elif time.monotonic() - last_event > stall_timeout_s:
            raise GeneratorError(f"no completion for {stall_timeout_s:.0f} s, {num_missing} prompts have none")
        finished = [event for event in events if isinstance(event, Finished)]
        num_missing -= len(finished)
        yield from finished


def require_complete(group: Group, request: Request, plan: SamplingPlan, max_new_tokens: int) -> Group:
    """Refuse an answer that is not what was asked for, before anything is trained on it.

    Raises:
        GeneratorError: wrong number of completions, wrong length, or a logprob that is not one.
    """
    if len(group) != plan.num_completions:
        raise GeneratorError(f"prompt {request.prompt_id}: {len(group)} completions instead of {plan.num_completions}")
    for completion in group:
        num_tokens, num_logprobs = len(completion.token_ids), len(completion.sampling_logprobs)
        most = plan.max_tokens(max_new_tokens, greedy=completion.is_greedy)
        if not 1 <= num_tokens <= most or num_tokens != num_logprobs:
            raise GeneratorError(
                f"prompt {request.prompt_id}: {num_tokens} tokens and {num_logprobs} logprobs; "
                f"expected 1…{most} of each"
            )
        wrong = [logprob for logprob in completion.sampling_logprobs if not LEAST_LOGPROB <= logprob <= 1e-3]
        if wrong:
            raise GeneratorError(
                f"prompt {request.prompt_id}: {wrong[0]} is no logprob of a sampled token; "
                f"expected {LEAST_LOGPROB:.0f}…0"
            )
    return group
