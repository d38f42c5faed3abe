"""Task `problems`: problems with a worked solution that ends in a number, as in GSM8K, from a file or the hub.

There is no reward model: a completion is right or wrong, and the task's rule says which. Demonstrations are the worked
solutions, always without GSM8K's calculator marks: `<<48/2=24>>` asks for a calculator while the model samples, and
there is none here.
"""

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from pydantic import Field, NonNegativeInt

from stages.common.config import Section
from stages.common.errors import InputError
from stages.data.answers import EXPECTED, find_answer, format_number
from stages.data.files import read_rows
from stages.data.records import Demonstration, Message
from stages.data.rows import Row, parse_rows
from stages.data.scorers import GoldConfig, NoScorer, RuleScorer, ScorerConfig
from stages.data.tasks.task import TaskData, make_group, make_prompt

CALCULATOR_MARK = re.compile(r"<<[^<>\n]*=[^<>\n]*>>")


class ProblemColumns(Section):
    """What the columns of the source are called."""

    prompt: str = "question"
    """The problem."""
    completion: str = "answer"
    """The worked solution; it ends in a line such as `#### 72`."""


class ProblemsTask(Section):
    """Problems, each with a worked solution to imitate and a number that solves it."""

    name: Literal["problems"]
    source: str = Field(min_length=1)
    """Path of a .jsonl, .json, .csv or .parquet file, or hub:OWNER/NAME[#CONFIG][@REVISION][:SPLIT]."""
    columns: ProblemColumns = ProblemColumns()
    max_bad_rows: NonNegativeInt = 0
    """Rows with unusable text or no answer that may be dropped; one more stops the stage and names the first."""
    second: ScorerConfig = NoScorer()
    """A scorer that is reported and never optimised; gold is the rule."""

    def load(self, seed: int) -> TaskData:  # noqa: ARG002  # nothing is drawn: the source decides
        """Read the source.

        Raises:
            InputError: the source or more than `max_bad_rows` of its rows are wrong, or one problem has two answers.
        """
        source = read_rows(self.source, [self.columns.prompt, self.columns.completion])
        problems, num_bad_rows = parse_rows(source.rows, self._parse, self.max_bad_rows)
        demonstrations = [problem.demonstration for problem in problems]
        return TaskData(
            prompts=[demonstration.prompt for demonstration in demonstrations],
            demonstrations=demonstrations,
            pairs=None,
            answers=_collect_answers(problems),
            num_rows=source.num_rows,
            num_duplicate_rows=source.num_duplicates,
            num_bad_rows=num_bad_rows,
        )

    def messages(self, text: str) -> tuple[Message, ...]:
        """A text typed by a person, as the problem."""
        return (Message("user", text),)

    def scorers(self) -> tuple[GoldConfig | None, ScorerConfig | None]:
        """The rule, and the second scorer if the setting names one."""
        return RuleScorer(), None if isinstance(self.second, NoScorer) else self.second

    def _parse(self, row: Row) -> "_Problem":
        problem, column = row.text(self.columns.prompt), self.columns.completion
        solution = CALCULATOR_MARK.sub("", row.text(column))
        answer = find_answer(solution)
        if answer is None:
            raise InputError(f"{row.place}: column {column!r} has no final answer; expected {EXPECTED}")
        prompt = make_prompt([Message("user", problem)], make_group(problem))
        return _Problem(row.place, Demonstration(prompt, solution), answer)


@dataclass(frozen=True)
class _Problem:
    place: str
    """File and line, for messages."""
    demonstration: Demonstration
    answer: Decimal


def _collect_answers(problems: list[_Problem]) -> dict[str, str]:
    """Answers by prompt_id; a problem may be there several times, with different solutions."""
    first: dict[str, _Problem] = {}
    for problem in problems:
        known = first.setdefault(problem.demonstration.prompt.prompt_id, problem)
        if known.answer != problem.answer:
            raise InputError(
                f"{problem.place}: the answer is {format_number(problem.answer)}, but {format_number(known.answer)} at "
                f"{known.place} for the same problem; expected one answer for each problem"
            )
    return {prompt_id: format_number(problem.answer) for prompt_id, problem in first.items()}
