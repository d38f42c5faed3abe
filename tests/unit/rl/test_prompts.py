from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from stages.generation.protocol import Request
from stages.rl.prompts import PromptStream

PROMPTS = [Request(f"p{index}", (index,), seed=0) for index in range(7)]


def draw(seed: int, num_passes: int = 3) -> list[Request]:
    stream = PromptStream(PROMPTS, seed)
    return [stream.get(ticket) for ticket in range(7 * num_passes)]


@given(seed=st.integers(0, 1000))
def test_each_pass_uses_every_prompt_once(seed: int) -> None:
    drawn = [request.prompt_id for request in draw(seed)]

    for start in (0, 7, 14):
        assert Counter(drawn[start : start + 7]) == dict.fromkeys((f"p{index}" for index in range(7)), 1)


@given(seed=st.integers(0, 1000), tickets=st.lists(st.integers(0, 20), max_size=30))
def test_a_ticket_has_the_same_prompt_in_whatever_order_it_is_asked_for(seed: int, tickets: list[int]) -> None:
    stream = PromptStream(PROMPTS, seed)

    drawn = draw(seed)
    assert [stream.get(ticket) for ticket in tickets] == [drawn[ticket] for ticket in tickets]


def test_a_prompt_drawn_again_is_sampled_with_another_seed() -> None:
    drawn = draw(seed=3)

    assert len({request.seed for request in drawn}) == 21


def test_passes_and_runs_have_orders_of_their_own() -> None:
    drawn = [request.prompt_id for request in draw(seed=3)]

    other_run = [request.prompt_id for request in draw(seed=4)]
    assert len({tuple(order) for order in (drawn[:7], drawn[7:14], drawn[14:], other_run[:7])}) == 4


def test_tokens_are_those_of_the_prompt() -> None:
    assert all(request.prompt_ids == (int(request.prompt_id[1:]),) for request in draw(seed=0))
