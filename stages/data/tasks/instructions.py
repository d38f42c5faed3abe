"""Task `instructions`: prompts with one good completion each, from a file or the hub.

There are no pairs: a gold scorer, if the task names one, labels what the SFT model samples.
"""

from typing import Literal, Self

from pydantic import Field, NonNegativeInt, model_validator

from stages.common.config import Section
from stages.data.files import read_rows
from stages.data.records import Demonstration, Message
from stages.data.rows import Row, parse_rows
from stages.data.scorers import NoScorer, ScorerConfig
from stages.data.tasks.task import TaskData, make_group, make_prompt


class InstructionColumns(Section):
    """What the columns of the source are called."""

    prompt: str | tuple[str, ...] = Field("prompt", min_length=1)
    """One column, or several to be joined by a blank line; those after the first may be empty."""
    completion: str = "completion"


class InstructionsTask(Section):
    """Prompts to follow, each with a completion to imitate."""

    name: Literal["instructions"]
    source: str = Field(min_length=1)
    """Path of a .jsonl, .json, .csv or .parquet file, or hub:OWNER/NAME[#CONFIG][@REVISION][:SPLIT]."""
    columns: InstructionColumns = InstructionColumns()
    max_bad_rows: NonNegativeInt = 0
    """Rows with unusable text that may be dropped; one more stops the stage and names the first."""
    gold: ScorerConfig = NoScorer()
    """Scorer that says which of two completions is better; there are no pairs, so one must be named."""
    second: ScorerConfig = NoScorer()
    """A scorer that is reported and never optimised."""

    @model_validator(mode="after")
    def check_gold(self) -> Self:
        """Without pairs and without a scorer nothing says what is better."""
        if isinstance(self.gold, NoScorer):
            raise ValueError(
                "data.task.gold='none': task instructions has no pairs, so a gold scorer must label samples; "
                "allowed: vader, textblob, length, model, classifier"
            )
        return self

    def load(self, seed: int) -> TaskData:  # noqa: ARG002  # nothing is drawn: the source decides
        """Read the source.

        Raises:
            InputError: the source or more than `max_bad_rows` of its rows are wrong.
        """
        first, *rest = self._prompt_columns()
        source = read_rows(self.source, [first, *rest, self.columns.completion], may_be_missing=rest)
        demonstrations, num_bad_rows = parse_rows(source.rows, self._parse, self.max_bad_rows)
        return TaskData(
            prompts=[demonstration.prompt for demonstration in demonstrations],
            demonstrations=demonstrations,
            pairs=None,
            num_rows=source.num_rows,
            num_duplicate_rows=source.num_duplicates,
            num_bad_rows=num_bad_rows,
        )

    def messages(self, text: str) -> tuple[Message, ...]:
        """A text typed by a person, as the instruction."""
        return (Message("user", text),)

    def scorers(self) -> tuple[ScorerConfig | None, ScorerConfig | None]:
        """Gold and second scorer; None where the setting says none."""
        gold, second = self.gold, self.second
        return (
            None if isinstance(gold, NoScorer) else gold,
            None if isinstance(second, NoScorer) else second,
        )

    def _prompt_columns(self) -> tuple[str, ...]:
        names = self.columns.prompt
        return (names,) if isinstance(names, str) else names

    def _parse(self, row: Row) -> Demonstration:
        first, *rest = self._prompt_columns()
        parts = [row.text(first), *(row.cells[column] for column in rest)]
        text = "\n\n".join(part for part in parts if part.strip())
        # The same instruction with another text to work on is the same problem.
        prompt = make_prompt([Message("user", text)], make_group(parts[0]))
        return Demonstration(prompt, row.text(self.columns.completion))
