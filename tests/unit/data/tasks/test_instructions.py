from pathlib import Path

import pytest

from stages.common.errors import InputError
from stages.data.records import Message
from stages.data.scorers import LengthScorer
from stages.data.tasks.instructions import InstructionColumns, InstructionsTask

JOINED = InstructionColumns(prompt=("instruction", "input"), completion="output")


def test_prompt_columns_are_joined_by_a_blank_line_and_empty_ones_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("id,instruction,input,output\n1,Shorten.,A long text.,Text.\n2,Say hi.,,Hi.\n")

    data = InstructionsTask(name="instructions", gold=LengthScorer(), source=str(path), columns=JOINED).load(seed=0)

    assert [prompt.messages for prompt in data.prompts] == [
        (Message("user", "Shorten.\n\nA long text."),),
        (Message("user", "Say hi."),),
    ]
    assert [demonstration.completion for demonstration in data.demonstrations] == ["Text.", "Hi."]
    assert data.pairs is None


def test_one_instruction_with_two_texts_is_one_group(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("instruction,input,output\nShorten.,One.,1\nshorten. ,Two.,2\nExpand.,One.,3\n")

    task = InstructionsTask(name="instructions", gold=LengthScorer(), source=str(path), columns=JOINED)
    groups = [prompt.group for prompt in task.load(0).prompts]

    assert groups[0] == groups[1] != groups[2]


@pytest.mark.parametrize(
    ("row", "message"),
    [(" ,Yes.", r"column 'prompt' is only white space"), ("Why?,", r"column 'completion' is empty; expected text")],
)
def test_a_row_without_text_is_named(tmp_path: Path, row: str, message: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"prompt,completion\nHi,Hello.\n{row}\n")

    with pytest.raises(InputError, match=rf"a\.csv, line 3: {message}"):
        InstructionsTask(name="instructions", gold=LengthScorer(), source=str(path)).load(seed=0)


def test_without_a_gold_scorer_nothing_would_say_what_is_better() -> None:
    with pytest.raises(ValueError, match=r"data\.task\.gold='none': task instructions has no pairs"):
        InstructionsTask(name="instructions", source="a.csv")
