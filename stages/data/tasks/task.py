"""What every task gives to the rest of the pipeline."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from stages.data.records import Demonstration, Message, Pair, Prompt
from stages.data.scorers import GoldConfig, ScorerConfig


@dataclass(frozen=True)
class TaskData:
    """What a task read or made, before it is split."""

    prompts: list[Prompt]
    demonstrations: list[Demonstration]
    pairs: list[Pair] | None
    """Pairs labelled by people; None if the task has none and a gold scorer must label."""
    num_rows: int
    """Rows of the source; prompts made, where a task has no source."""
    num_duplicate_rows: int = 0
    """Rows equal to an earlier one in every column used; they were dropped."""
    num_bad_rows: int = 0
    """Rows with unusable text that `max_bad_rows` allowed to drop."""
    answers: Mapping[str, str] | None = None
    """The number that solves each prompt, by prompt_id, where a rule scores completions; None where none does."""


class Task(Protocol):
    """A closed section of settings that knows how to load its own data."""

    def load(self, seed: int) -> TaskData:
        """Make or read everything; the same settings, seed and files give the same data."""
        ...

    def messages(self, text: str) -> tuple[Message, ...]:
        """A text a person types as a prompt of this task's form."""
        ...

    def scorers(self) -> tuple[GoldConfig | None, ScorerConfig | None]:
        """The gold scorer, and a second one that is reported and never optimised; None: not there.

        A rule as gold scorer is also what RL trains on, without a reward model; `load` must then give `answers`.
        """
        ...


def make_prompt(messages: Sequence[Message], group: str) -> Prompt:
    """A prompt whose id is a hash of its messages, 16 hexadecimal digits."""
    return Prompt(hash_messages(messages), tuple(messages), group)


def hash_messages(messages: Sequence[Message]) -> str:
    """Hash of roles and contents, 16 hexadecimal digits; equal conversations have equal hashes."""
    return _hash(json.dumps([[message.role, message.content] for message in messages]))


def make_group(text: str) -> str:
    """The group of every prompt that begins with this text, whatever its capitals and white space.

    Near-copies of a text are common in collected data; in two splits they would leak.
    """
    return _hash(" ".join(text.casefold().split()))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
