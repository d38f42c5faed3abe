"""Stand-ins that follow our protocols, for tests that need no model."""

from collections.abc import Sequence

from stages.data.records import Completion


class FakeScorer:
    """Gives the scores it was made with, in order."""

    def __init__(self, scores: Sequence[float]) -> None:
        self._scores = list(scores)

    def score(self, completions: Sequence[Completion]) -> list[float]:
        assert len(completions) == len(self._scores)
        return self._scores


def make_completion(
    text: str,
    *,
    prompt_id: str = "p",
    sample_index: int = 0,
    finished: bool = True,
    token_ids: tuple[int, ...] = (5, 258),
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
        first_policy_version=0,
        last_policy_version=0,
    )
