import json
from pathlib import Path

import pytest

from stages.common.errors import InputError
from stages.data.config import DataConfig
from stages.data.prepare import prepare_data
from stages.data.records import Message
from stages.data.rules import read_rule
from stages.data.scorers import LengthScorer, RuleScorer
from stages.data.store import write_task_data
from stages.data.tasks.problems import ProblemColumns, ProblemsTask
from stages.data.tasks.task import TaskData


def write(folder: Path, *rows: tuple[str, str]) -> str:
    path = folder / "a.jsonl"
    path.write_text("\n".join(json.dumps({"question": problem, "answer": solution}) for problem, solution in rows))
    return str(path)


def load(source: str, **settings: object) -> TaskData:
    return ProblemsTask.model_validate({"name": "problems", "source": source} | settings).load(seed=0)


def test_a_row_of_gsm8k_is_a_prompt_a_demonstration_and_an_answer(tmp_path: Path) -> None:
    solution = "She sold 48/2 = <<48/2=24>>24.\nThat is $<<48+24=72>>72. 1 << 2.\n#### 72"

    data = load(write(tmp_path, ("How many clips?", solution)))

    (prompt,) = data.prompts
    assert prompt.messages == (Message("user", "How many clips?"),)
    assert data.demonstrations[0].prompt == prompt
    assert data.demonstrations[0].completion == "She sold 48/2 = 24.\nThat is $72. 1 << 2.\n#### 72"
    assert data.answers == {prompt.prompt_id: "72"}
    assert data.pairs is None


def test_columns_may_have_other_names_and_answers_keep_every_digit(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('problem,solution\nHow much?,"#### $1,234.50"\nHow little?,#### .0000001\n')

    data = load(str(path), columns=ProblemColumns(prompt="problem", completion="solution"))

    assert list((data.answers or {}).values()) == ["1234.50", "0.0000001"]


def test_one_problem_with_two_solutions_is_one_prompt_in_one_group(tmp_path: Path) -> None:
    data = load(write(tmp_path, ("Why?", "One way.\n#### 72"), ("Why?", "Another.\n#### 72.0"), ("why? ", "#### 72")))

    assert len({prompt.prompt_id for prompt in data.prompts}) == len(data.answers or {}) == 2
    assert len({prompt.group for prompt in data.prompts}) == 1
    assert len(data.demonstrations) == 3


@pytest.mark.parametrize("solution", ["It is 72.", "#### seventy-two", "#### 3/4"])
def test_a_row_without_an_answer_is_named_with_what_is_allowed(tmp_path: Path, solution: str) -> None:
    source = write(tmp_path, ("Fine?", "#### 1"), ("Why?", solution))

    with pytest.raises(InputError, match=r"a\.jsonl, line 2: column 'answer' has no final answer; expected .*#### 72'"):
        load(source)
    assert load(source, max_bad_rows=1).num_bad_rows == 1


def test_two_answers_to_one_problem_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path, ("Why?", "#### 1"), ("Why?", "Oh.\n#### 2"))

    with pytest.raises(InputError, match=r"line 2: the answer is 2, but 1 at .*a\.jsonl, line 1 for the same"):
        load(source, max_bad_rows=5)


def test_the_rule_is_gold_and_a_second_scorer_may_be_named(tmp_path: Path) -> None:
    task = {"name": "problems", "source": str(tmp_path)}

    assert ProblemsTask.model_validate(task).scorers() == (RuleScorer(), None)
    named = ProblemsTask.model_validate(task | {"second": {"name": "length"}})
    assert named.scorers() == (RuleScorer(), LengthScorer())


def test_the_data_artifact_has_the_answers_of_all_splits_and_of_no_unused_prompt(tmp_path: Path) -> None:
    source = write(tmp_path, *((f"What is {number}?", f"#### {number}") for number in range(9)))
    task = {"name": "problems", "source": source}
    sizes = {"num_validation_prompts": 2, "num_heldout_prompts": 3, "max_train_prompts": 2}
    config = DataConfig.model_validate({"seed": 0, "task": task} | sizes)

    prepared = prepare_data(config.task.load(0), config)
    write_task_data(tmp_path, prepared)

    of_splits = {prompt.prompt_id: prompt for data in prepared.splits.values() for prompt in data.prompts}
    answers = read_rule(tmp_path)
    assert answers.keys() == of_splits.keys()
    assert len(answers) == 7
    for prompt_id, answer in answers.items():
        assert of_splits[prompt_id].messages[0].content == f"What is {answer}?"
