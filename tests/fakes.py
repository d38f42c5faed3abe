"""Stand-ins that follow our protocols, for tests that need no model."""

from collections.abc import Sequence

from stages.data.records import Completion
from stages.generation.protocol import Event, Finished, Published, Ticket, WeightsUpdate


class FakeScorer:
    """Gives the scores it was made with, in order."""

    def __init__(self, scores: Sequence[float]) -> None:
        self._scores = list(scores)

    def score(self, completions: Sequence[Completion]) -> list[float]:
        assert len(completions) == len(self._scores)
        return self._scores


class FakeGenerator:
    """Answers everything at the next `wait`, the last ticket first, with completions of the published version."""

    def __init__(self) -> None:
        self.submitted: list[Ticket] = []
        self.published: list[WeightsUpdate] = []
        self.is_closed = False
        self._events: list[Event] = []

    def submit(self, ticket: Ticket) -> None:
        version = self.published[-1].policy_version if self.published else 0
        group = tuple(
            make_completion(
                f"{ticket.request.prompt_id}-{index}",
                prompt_id=ticket.request.prompt_id,
                sample_index=index,
                policy_version=version,
            )
            for index in range(ticket.plan.num_completions)
        )
        self.submitted.append(ticket)
        self._events.append(Finished(ticket, group, "fake"))

    def publish(self, update: WeightsUpdate) -> None:
        self.published.append(update)
        self._events.append(Published(update.policy_version, "fake", seconds=0.0))

    def wait(self, timeout_s: float) -> list[Event]:  # noqa: ARG002  it never has to
        events, self._events = self._events[::-1], []
        return events

    def close(self) -> None:
        self.is_closed = True


def make_completion(
    text: str,
    *,
    prompt_id: str = "p",
    sample_index: int = 0,
    finished: bool = True,
    token_ids: tuple[int, ...] = (5, 258),
    policy_version: int = 0,
) -> Completion:
    return Completion(
        prompt_id=prompt_id,
        sample_index=sample_index,
        is_greedy=False,
        prompt_ids=(1, 2),
        token_ids=token_ids,
        sampling_logprobs=(-1.0,) * len(token_ids),
        text=text,
        is_finished=finished,
        first_policy_version=policy_version,
        last_policy_version=policy_version,
    )
