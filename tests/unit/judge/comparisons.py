"""Small comparisons written out by hand."""

from collections.abc import Sequence

from stages.data.records import Completion
from stages.judge.comparison import Comparison, ScoredSamples


def completion(
    prompt_id: str, text: str, num_tokens: int, *, finished: bool = True, sample_index: int = 0
) -> Completion:
    return Completion(
        prompt_id=prompt_id,
        sample_index=sample_index,
        is_greedy=False,
        prompt_ids=(1, 2),
        token_ids=(5,) * num_tokens,
        sampling_logprobs=(-1.0,) * num_tokens,
        text=text,
        is_finished=finished,
        first_policy_version=0,
        last_policy_version=0,
    )


def scored(
    completions: list[Completion], gold: list[float] | None, proxy: list[float], nll: Sequence[float] = (2.0, 2.0)
) -> ScoredSamples:
    return ScoredSamples(completions, [-value for value in nll], gold, gold, proxy)


def small_comparison() -> Comparison:
    """Two prompts, one sample each: gold 1 win and 1 loss, proxy 1 win and 1 tie, KL 1 and 3 nats."""
    sft = [completion("a", "a good film", 4), completion("b", "a good film", 4)]
    policy = [completion("a", "a great film", 4), completion("b", "so | bad", 8, finished=False)]
    return Comparison(
        sft=scored(sft, [0.1, 0.2], [0.0, 1.0]),
        policy=scored(policy, [0.5, 0.9], [2.0, 1.0], nll=(4.0, 8.0)),
        kl_exact=[1.0, 3.0],
        kl_k1=[0.5, 2.5],
    )
