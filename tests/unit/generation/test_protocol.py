from dataclasses import replace
from pathlib import Path

import pytest

from stages.common.errors import GeneratorError
from stages.generation.protocol import Event, Lost, Request, SamplingPlan, WeightsUpdate, generate, require_complete
from tests.fakes import FakeGenerator, make_completion

REQUESTS = [Request("a", (5, 6), seed=1), Request("b", (7, 8, 9), seed=2), Request("c", (7,), seed=3)]


class Stalled(FakeGenerator):
    """Loses the first ticket and never answers any."""

    def wait(self, timeout_s: float) -> list[Event]:
        lost = [event.ticket for event in super().wait(timeout_s) if not isinstance(event, Lost)][:1]
        return [Lost(ticket, "replica_lost", "killed") for ticket in lost]


def test_groups_come_in_the_order_of_the_prompts_whichever_is_finished_first() -> None:
    generator = FakeGenerator()
    generator.publish(WeightsUpdate(4, Path("unused")))

    groups = generate(generator, REQUESTS, SamplingPlan(2, with_greedy=True))

    assert [[item.text for item in group] for group in groups] == [
        ["a-0", "a-1", "a-2"],
        ["b-0", "b-1", "b-2"],
        ["c-0", "c-1", "c-2"],
    ]
    assert [ticket.number for ticket in generator.submitted] == [0, 1, 2]
    assert generate(generator, [], SamplingPlan(1)) == []


def test_a_generator_that_does_nothing_any_more_is_not_waited_for_for_ever() -> None:
    with pytest.raises(GeneratorError, match="no completion for 0 s, 3 prompts have none"):
        generate(Stalled(), REQUESTS, SamplingPlan(1), stall_timeout_s=0.0)


def test_unusable_answers_are_refused() -> None:
    request, plan = REQUESTS[0], SamplingPlan(num_samples=1)
    good = make_completion("x")

    assert require_complete((good,), request, plan, 6) == (good,)
    with pytest.raises(GeneratorError, match="2 completions instead of 1"):
        require_complete((good, good), request, plan, 6)
    with pytest.raises(GeneratorError, match="2 tokens and 2 logprobs; expected 1…1"):
        require_complete((good,), request, plan, 1)
    with pytest.raises(GeneratorError, match="2 tokens and 1 logprobs"):
        require_complete((replace(good, sampling_logprobs=(-1.0,)),), request, plan, 6)
    for bad in (float("nan"), float("-inf"), 0.5, -9999.0):  # the last is what vLLM sends for NaN
        with pytest.raises(GeneratorError, match="is no logprob of a sampled token"):
            require_complete((replace(good, sampling_logprobs=(-1.0, bad)),), request, plan, 6)
