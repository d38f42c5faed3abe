"""A task's rule as a scorer: it knows the answer of every prompt, reads the completion's text, and needs no model."""

from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path

from stages.common.errors import InputError
from stages.data.answers import find_answer, parse_number
from stages.data.records import Completion
from stages.data.rules import RULE, read_rule

SCORE_RANGE = (0.0, 1.0)
"""Lowest and highest score."""


def is_rule(path: Path) -> bool:
    """Whether an artifact holds a rule: artifacts/reward then holds no model, artifacts/data is of such a task."""
    return (path / RULE).is_file()


class RuleScorer:
    """1 if the last `#### number` of a completion equals its prompt's answer as a number, else 0.

    Whether the completion is finished plays no part here; the missing-EOS rule is RL's.

    Args:
        path: artifacts/reward or artifacts/data of a task with a rule.

    Raises:
        InputError: the directory holds no rule of this project.
    """

    def __init__(self, path: Path) -> None:
        self._path = path / RULE
        self._answers: dict[str, Decimal] = {}
        for prompt_id, text in read_rule(path).items():
            answer = parse_number(text)
            if answer is None:
                raise InputError(f"{self._path}: answer of prompt {prompt_id} is {text!r}; expected a number")
            self._answers[prompt_id] = answer

    def score(self, completions: Sequence[Completion]) -> list[float]:
        """0 or 1 for each completion.

        Raises:
            InputError: a prompt that the rule has no answer for.
        """
        return [self.score_text(item.prompt_id, item.text) for item in completions]

    def score_text(self, prompt_id: str, text: str) -> float:
        """0 or 1 for one completion's text.

        Raises:
            InputError: a prompt that the rule has no answer for.
        """
        if prompt_id not in self._answers:
            raise InputError(
                f"{self._path}: has no answer for prompt {prompt_id}; the rule and the prompts are of different data, "
                "run both stages again (dvc repro)"
            )
        return float(find_answer(text) == self._answers[prompt_id])
