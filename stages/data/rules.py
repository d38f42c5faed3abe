"""rule.json: a task's rule, in artifacts/data where the task gives one and in artifacts/reward in a model's place.

    {"format": 1, "kind": "exact_answer", "answers": {prompt_id: number}}

`answers` holds the prompts of all splits: RL scores training and validation prompts by it, the judge held-out ones.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from stages.common.errors import InputError
from stages.common.publish import write_json

RULE = "rule.json"
FORMAT = 1
KIND = "exact_answer"


def write_rule(directory: Path, answers: Mapping[str, str]) -> None:
    """Write the rule `exact_answer`; the same answers give the same bytes.

    Args:
        directory: an artifact that is being written.
        answers: the number that solves each problem, by prompt_id.
    """
    write_json(directory / RULE, {"format": FORMAT, "kind": KIND, "answers": dict(sorted(answers.items()))})


def read_rule(directory: Path) -> dict[str, str]:
    """The number that solves each problem, by prompt_id.

    Raises:
        InputError: the file is missing, or is not what `write_rule` writes.
    """
    path = directory / RULE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: not found; run the stage that writes it (dvc repro)") from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise InputError(f"{path}: not valid JSON: {error}") from error
    expected = {"format": FORMAT, "kind": KIND}
    found = {name: content.get(name) for name in expected} if isinstance(content, dict) else content
    if found != expected:
        raise InputError(f"{path}: is {found!r}; allowed: {expected!r}")
    answers = content.get("answers")
    if not isinstance(answers, dict) or not all(isinstance(answer, str) for answer in answers.values()):
        raise InputError(f"{path}: has no 'answers'; expected an object of numbers as text, by prompt_id")
    return answers
