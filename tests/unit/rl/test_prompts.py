from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from stages.generation.protocol import Request
from stages.rl.prompts import select_prompts

PROMPTS = [Request(f"p{index}", (index,), seed=0) for index in range(7)]


@given(size=st.integers(1, 20), seed=st.integers(0, 1000))
def test_each_epoch_uses_every_prompt_once(size: int, seed: int) -> None:
    updates = [select_prompts(PROMPTS, update, size, seed) for update in range(21)]
    drawn = [request.prompt_id for update in updates for request in update]

    for start in range(0, len(drawn) - 6, 7):
        assert len(set(drawn[start : start + 7])) == 7


def test_a_prompt_drawn_again_is_sampled_with_another_seed() -> None:
    drawn = [request for update in range(7) for request in select_prompts(PROMPTS, update, 2, seed=3)]

    assert Counter(request.prompt_id for request in drawn) == dict.fromkeys(Counter(p.prompt_id for p in PROMPTS), 2)
    assert len({request.seed for request in drawn}) == 14
