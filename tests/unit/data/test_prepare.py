import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.common.errors import SettingError
from stages.data.config import DataConfig
from stages.data.prepare import PreparedData, prepare_data
from stages.data.records import SPLITS, Demonstration, Message, Pair, Prompt
from stages.data.tasks.task import TaskData, make_prompt


def make_config(*, validation: int = 2, heldout: int = 3, seed: int = 0, limit: int | None = None) -> DataConfig:
    settings = {"seed": seed, "task": {"name": "reviews"}, "max_train_prompts": limit}
    return DataConfig.model_validate(settings | {"num_validation_prompts": validation, "num_heldout_prompts": heldout})


def make_prompts(group_sizes: list[int]) -> list[Prompt]:
    return [
        make_prompt([Message("user", f"prompt {index} of group {group}")], f"group {group}")
        for group, size in enumerate(group_sizes)
        for index in range(size)
    ]


def make_data(prompts: list[Prompt]) -> TaskData:
    demonstrations = [Demonstration(prompt, completion) for prompt in prompts for completion in ("one", "two")]
    pairs = [Pair(prompt, "good", "bad") for prompt in prompts]
    return TaskData(prompts, demonstrations, pairs, num_rows=len(prompts))


def ids(prepared: PreparedData) -> dict[str, list[str]]:
    return {split: [prompt.prompt_id for prompt in data.prompts] for split, data in prepared.splits.items()}


many_groups = st.lists(st.integers(1, 6), min_size=8, max_size=20)
seeds = st.integers(0, 2**32)


@given(sizes=many_groups, seed=seeds)
def test_no_group_and_no_text_lies_in_two_splits(sizes: list[int], seed: int) -> None:
    splits = prepare_data(make_data(make_prompts(sizes)), make_config(seed=seed)).splits

    for one, other in (("train", "validation"), ("train", "heldout"), ("validation", "heldout")):
        assert not {p.group for p in splits[one].prompts} & {p.group for p in splits[other].prompts}
        assert not {p.messages for p in splits[one].prompts} & {p.messages for p in splits[other].prompts}


@given(sizes=many_groups, seed=seeds)
def test_validation_and_heldout_have_the_size_asked_for(sizes: list[int], seed: int) -> None:
    prepared = prepare_data(make_data(make_prompts(sizes)), make_config(seed=seed))
    counts = {split: len(data.prompts) for split, data in prepared.splits.items()}

    assert (counts["validation"], counts["heldout"]) == (2, 3)
    assert sum(counts.values()) + prepared.num_unused_prompts == sum(sizes)


@given(sizes=many_groups, seed=seeds, order=seeds)
def test_the_order_of_rows_changes_nothing(sizes: list[int], seed: int, order: int) -> None:
    prompts = make_prompts(sizes)
    shuffled = random.Random(order).sample(prompts, len(prompts))

    assert prepare_data(make_data(shuffled), make_config(seed=seed)) == prepare_data(
        make_data(prompts), make_config(seed=seed)
    )


@given(sizes=many_groups, seed=seeds)
def test_demonstrations_and_pairs_follow_their_prompt(sizes: list[int], seed: int) -> None:
    for data in prepare_data(make_data(make_prompts(sizes)), make_config(seed=seed)).splits.values():
        assert {item.prompt for item in data.demonstrations} == set(data.prompts)
        assert len(data.demonstrations) == 2 * len(data.prompts)
        assert [pair.prompt for pair in data.pairs or []] == sorted(data.prompts, key=lambda p: p.prompt_id)


@given(seed=seeds, limit=st.integers(1, 40))
def test_a_limit_of_training_prompts_changes_no_other_split(seed: int, limit: int) -> None:
    data = make_data(make_prompts([3] * 12))
    whole, limited = (prepare_data(data, make_config(seed=seed, limit=size)) for size in (None, limit))

    assert ids(limited) == ids(whole) | {"train": ids(whole)["train"][:limit]}


def test_another_seed_gives_another_split() -> None:
    data = make_data(make_prompts([1] * 40))

    assert len({tuple(ids(prepare_data(data, make_config(seed=seed)))["heldout"]) for seed in range(5)}) == 5


def test_the_global_random_state_is_neither_read_nor_changed() -> None:
    random.seed(1)
    before = random.getstate()
    first = prepare_data(make_data(make_prompts([2] * 9)), make_config())
    assert random.getstate() == before
    random.seed(2)

    assert prepare_data(make_data(make_prompts([2] * 9)), make_config()) == first


def test_equal_prompts_are_merged_and_counted() -> None:
    prompts = make_prompts([1] * 10)
    prepared = prepare_data(make_data([*prompts, prompts[0], prompts[1]]), make_config())

    assert prepared.num_duplicate_prompts == 2
    assert sum(len(data.demonstrations) for data in prepared.splits.values()) == 20  # two each, none twice


def test_a_group_larger_than_a_split_is_cut_and_its_rest_unused() -> None:
    prepared = prepare_data(make_data(make_prompts([5, 5, 5])), make_config())

    assert {split: len(data.prompts) for split, data in prepared.splits.items()} == {
        "train": 5,
        "validation": 2,
        "heldout": 3,
    }
    assert prepared.num_unused_prompts == 5  # 5 - 2 of one group, 5 - 3 of another


@pytest.mark.parametrize("sizes", [[1] * 5, [3, 3], [50], []])
def test_too_few_prompts_or_groups_are_refused_with_the_numbers(sizes: list[int]) -> None:
    message = (
        r"^data\.num_heldout_prompts=3 and data\.num_validation_prompts=2 are too many: "
        rf"the task has {sum(sizes)} different prompts in {len(sizes)} groups"
    )
    with pytest.raises(SettingError, match=message):
        prepare_data(make_data(make_prompts(sizes)), make_config())


def test_metrics_count_every_split() -> None:
    metrics = prepare_data(make_data(make_prompts([2] * 9)), make_config()).metrics()

    # heldout 3 = 2 + 1 of a cut group, validation 2, train 18 - 4 - 2
    assert metrics["data/prompts/train"] == 12.0
    assert metrics["data/demonstrations/heldout"] == 6.0
    assert metrics["data/pairs/validation"] == 2.0
    assert metrics["data/groups/heldout"] == 2.0
    assert metrics["data/unused_prompts"] == 1.0
    assert {name.split("/")[-1] for name in metrics} >= set(SPLITS)
