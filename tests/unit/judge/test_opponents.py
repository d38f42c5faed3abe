import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from stages.common.errors import InputError, SettingError
from stages.data.completion_store import write_completions
from stages.data.prepare import PreparedData, SplitData
from stages.data.records import Demonstration
from stages.data.store import write_task_data
from stages.judge.alpaca import write_outputs
from stages.judge.opponents import Opponent, Places, find_opponent, make_matches
from tests.unit.judge.comparisons import completion
from tests.unit.judge.judgements import prompt

PROMPTS = [prompt("a"), prompt("b")]
SAMPLES = [completion(prompt_id, f"{prompt_id}{k}", 2, sample_index=k) for prompt_id in ("a", "b") for k in (0, 1)]


def test_the_sft_models_samples_meet_the_policys_one_by_one(tmp_path: Path) -> None:
    write_completions(tmp_path / "sft.parquet", SAMPLES)

    opponent = find_opponent("sft", PROMPTS, Places(samples=tmp_path))
    matches = make_matches(PROMPTS, SAMPLES[::-1], opponent)

    assert opponent.name == "sft"
    assert opponent.sha256 == hashlib.sha256((tmp_path / "sft.parquet").read_bytes()).hexdigest()
    assert [(item.prompt.prompt_id, item.sample_index, item.policy, item.opponent) for item in matches] == [
        ("b", 1, "b1", "b1"),
        ("b", 0, "b0", "b0"),
        ("a", 1, "a1", "a1"),
        ("a", 0, "a0", "a0"),
    ]


def test_one_completion_of_a_prompt_meets_every_sample(tmp_path: Path) -> None:
    write_outputs(tmp_path / "gpt.json", PROMPTS, [completion("a", "A", 2), completion("b", "B", 2)], "gpt")

    opponent = find_opponent(str(tmp_path / "gpt.json"), PROMPTS, Places())

    assert opponent.name == "gpt"
    assert [item.opponent for item in make_matches(PROMPTS, SAMPLES, opponent)] == ["A", "A", "B", "B"]


def test_samples_that_were_cut_stay_so(tmp_path: Path) -> None:
    cut = [replace(item, is_finished=item.sample_index == 0) for item in SAMPLES]
    write_completions(tmp_path / "other.parquet", cut)

    opponent = find_opponent(str(tmp_path / "other.parquet"), PROMPTS, Places())

    assert [opponent.finished[opponent.find_key(item)] for item in SAMPLES] == [True, False, True, False]


def test_too_few_samples_of_an_opponent_are_named() -> None:
    opponent = Opponent("other", {("a", 0): "x", ("a", 1): "y"}, "0")
    third = completion("a", "z", 2, sample_index=2)

    with pytest.raises(SettingError, match=r"^judge\.against: other has no sample 2 of prompt a; "):
        make_matches(PROMPTS, [third], opponent)


def prepare(folder: Path, demonstrations: list[Demonstration]) -> Places:
    split = SplitData(prompts=PROMPTS, demonstrations=demonstrations, pairs=None)
    write_task_data(folder, PreparedData({"heldout": split}, 2, 0, 0, 0, 0))
    return Places(data=folder)


def test_the_tasks_demonstrations_are_opponents(tmp_path: Path) -> None:
    places = prepare(tmp_path, [Demonstration(item, f"good {item.prompt_id}") for item in PROMPTS])

    assert find_opponent("references", PROMPTS, places).texts == {("a", 0): "good a", ("b", 0): "good b"}


def test_a_task_without_demonstrations_of_every_prompt_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"^judge\.against=references: the task has no demonstrations"):
        find_opponent("references", PROMPTS, prepare(tmp_path, []))
    with pytest.raises(SettingError, match=r"^judge\.against=references: .* 1 of 2 held-out prompts, the first b"):
        find_opponent("references", PROMPTS, prepare(tmp_path, [Demonstration(PROMPTS[0], "x")]))


def test_a_file_of_other_prompts_a_missing_one_and_a_moving_target_are_named(tmp_path: Path) -> None:
    write_completions(tmp_path / "other.parquet", [completion("z", "x", 2)])

    with pytest.raises(
        SettingError, match=r"other\.parquet: has no completion of 2 of 2 held-out prompts, the first a"
    ):
        find_opponent(str(tmp_path / "other.parquet"), PROMPTS, Places())
    with pytest.raises(InputError, match=r"none\.parquet"):
        find_opponent(str(tmp_path / "none.parquet"), PROMPTS, Places())
    with pytest.raises(SettingError, match=r"^judge\.against=latest: names another run every time"):
        find_opponent("latest", PROMPTS, Places())
