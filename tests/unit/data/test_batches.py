import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.data.batches import SharedSize, collate, length_grouped_batches, split_by_prompts, split_by_tokens
from stages.data.text import TokenSequence


def test_collate_pads_on_the_right_and_marks_what_counts() -> None:
    batch = collate([TokenSequence((1, 2), (3, 258)), TokenSequence((4,), (5,))])

    assert batch.input_ids.tolist() == [[1, 2, 3, 258], [4, 5, 0, 0]]
    assert batch.attention_mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert batch.completion_ids.tolist() == [[3, 258], [5, 0]]
    assert batch.completion_mask.tolist() == [[True, True], [True, False]]
    assert torch.equal(batch.prompt_lengths, torch.tensor([2, 1]))


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40), max_tokens=st.integers(1, 120))
def test_micro_batches_hold_everything_once_within_the_budget(lengths: list[int], max_tokens: int) -> None:
    groups = split_by_tokens(lengths, max_tokens)

    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        padded = len(group) * max(lengths[index] for index in group)
        assert padded <= max_tokens or len(group) == 1


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=80), size=st.integers(1, 9), seed=st.integers(0, 99))
def test_an_epoch_uses_every_example_once_in_an_order_of_its_seed(lengths: list[int], size: int, seed: int) -> None:
    batches = list(length_grouped_batches(lengths, size, seed))

    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(len(batch) <= size for batch in batches)
    assert batches == list(length_grouped_batches(lengths, size, seed))


shared_sizes = st.lists(
    st.builds(
        lambda prompt, rows, tokens: SharedSize(prompt, 5 + 7 * prompt, rows, tokens),
        st.integers(0, 4),
        st.integers(1, 2),
        st.integers(1, 20),
    ),
    min_size=1,
    max_size=24,
)


@given(sizes=shared_sizes, max_tokens=st.integers(1, 200), num_ranks=st.integers(1, 4))
def test_units_of_one_prompt_stay_together_within_the_budget(
    sizes: list[SharedSize], max_tokens: int, num_ranks: int
) -> None:
    alone, groups = split_by_prompts(sizes, max_tokens), split_by_prompts(sizes, max_tokens, num_ranks)

    assert sorted(unit for group in groups for unit in group) == list(range(len(sizes)))
    for group in groups:
        members = [sizes[unit] for unit in group]
        prompts = {member.prompt: member.prompt_tokens for member in members}
        rows = sum(member.rows for member in members)
        padded = len(prompts) * max(prompts.values()) + rows * max(member.completion_tokens for member in members)
        assert padded <= max_tokens or len(group) == 1
    assert len(groups) % num_ranks == 0 or all(len(group) == 1 for group in groups)
    for prompt in {size.prompt for size in sizes}:
        members = [size for size in sizes if size.prompt == prompt]
        whole = members[0].prompt_tokens + sum(size.rows for size in members) * max(
            m.completion_tokens for m in members
        )
        holders = [group for group in alone if any(sizes[unit].prompt == prompt for unit in group)]
        assert len(holders) == 1 or whole > max_tokens
