"""Task `pairs`: preferences of people, from a file or the hub.

Two formats. `columns`: a prompt and two completions. `transcripts`: two whole conversations, as in
HH-RLHF, that differ in their last turn; a row whose conversations differ earlier is a bad row.
Demonstrations are the preferred completions, one per prompt.
"""

from typing import Literal

from pydantic import Field, NonNegativeInt

from stages.common.config import Section
from stages.common.errors import InputError
from stages.data.files import read_rows
from stages.data.records import Demonstration, Message, Pair
from stages.data.rows import Row, parse_rows
from stages.data.scorers import NoScorer, ScorerConfig
from stages.data.tasks.task import TaskData, make_group, make_prompt
from stages.data.tasks.transcripts import find_opening, split_transcript


class PairColumns(Section):
    """What the columns of the source are called."""

    prompt: str = "prompt"
    """Read in format `columns` only; a transcript holds its own prompt."""
    chosen: str = "chosen"
    rejected: str = "rejected"


class PairsTask(Section):
    """Prompts with two completions each, one preferred by a person."""

    name: Literal["pairs"]
    source: str = Field(min_length=1)
    """Path of a .jsonl, .json, .csv or .parquet file, or hub:OWNER/NAME[#CONFIG][@REVISION][:SPLIT]."""
    format: Literal["columns", "transcripts"] = "columns"
    """columns: prompt, chosen, rejected. transcripts: chosen and rejected hold whole conversations."""
    columns: PairColumns = PairColumns()
    max_bad_rows: NonNegativeInt = 0
    """Rows with unusable text that may be dropped; one more stops the stage and names the first."""
    gold: ScorerConfig = NoScorer()
    """Scorer that judges in people's place; none: only their pairs count."""
    second: ScorerConfig = NoScorer()
    """A scorer that is reported and never optimised."""

    def load(self, seed: int) -> TaskData:  # noqa: ARG002  # nothing is drawn: the source decides
        """Read the source.

        Raises:
            InputError: the source or more than `max_bad_rows` of its rows are wrong.
        """
        names = self.columns
        parse, wanted = self._parse_transcripts, [names.chosen, names.rejected]
        if self.format == "columns":
            parse, wanted = self._parse_columns, [names.prompt, *wanted]
        source = read_rows(self.source, wanted)
        pairs, num_bad_rows = parse_rows(source.rows, parse, self.max_bad_rows)
        return TaskData(
            prompts=[pair.prompt for pair in pairs],
            demonstrations=_choose_demonstrations(pairs),
            pairs=pairs,
            num_rows=source.num_rows,
            num_duplicate_rows=source.num_duplicates,
            num_bad_rows=num_bad_rows,
        )

    def messages(self, text: str) -> tuple[Message, ...]:
        """A text typed by a person, as the first turn."""
        return (Message("user", text),)

    def scorers(self) -> tuple[ScorerConfig | None, ScorerConfig | None]:
        """Gold and second scorer; None where the setting says none."""
        return _none(self.gold), _none(self.second)

    def _parse_columns(self, row: Row) -> Pair:
        prompt = row.text(self.columns.prompt)
        messages = (Message("user", prompt),)
        chosen, rejected = row.text(self.columns.chosen), row.text(self.columns.rejected)
        return self._make_pair(row, messages, chosen, rejected)

    def _parse_transcripts(self, row: Row) -> Pair:
        (messages, chosen), (others, rejected) = (
            split_transcript(row.text(column), f"{row.place}: column {column!r}")
            for column in (self.columns.chosen, self.columns.rejected)
        )
        if messages != others:
            raise InputError(
                f"{row.place}: columns {self.columns.chosen!r} and {self.columns.rejected!r} differ before "
                "their last turn; expected one prompt with two completions"
            )
        return self._make_pair(row, messages, chosen, rejected)

    def _make_pair(self, row: Row, messages: tuple[Message, ...], chosen: str, rejected: str) -> Pair:
        if chosen == rejected:
            raise InputError(
                f"{row.place}: columns {self.columns.chosen!r} and {self.columns.rejected!r} hold the same "
                "completion; expected two different ones"
            )
        # One conversation is often cut at several turns; all its cuts begin with the same message.
        return Pair(make_prompt(messages, make_group(find_opening(messages[0].content))), chosen, rejected)


def _choose_demonstrations(pairs: list[Pair]) -> list[Demonstration]:
    """The preferred completion of each prompt; of several the first in alphabetical order.

    Not the first in the file: the order of rows must not change what is learned.
    """
    best: dict[str, Pair] = {}
    for pair in pairs:
        known = best.setdefault(pair.prompt.prompt_id, pair)
        if pair.chosen < known.chosen:
            best[pair.prompt.prompt_id] = pair
    return [Demonstration(pair.prompt, pair.chosen) for pair in best.values()]


def _none(scorer: ScorerConfig) -> ScorerConfig | None:
    return None if isinstance(scorer, NoScorer) else scorer
