"""What the body of an endpoint's reply says, read strictly: a chat completion with one text, or a reason why not."""

import json
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stages.judge.llm.account import Tokens
from stages.judge.llm.redaction import Redact

MAX_SHOWN = 200
"""Characters of a server's message that an error shows."""


@dataclass(frozen=True)
class Answer:
    """A chat completion."""

    id: str
    """As the endpoint numbers it; most give every answer another one."""
    text: str
    model: str
    """As the endpoint names it."""
    tokens: Tokens | None
    """What it is billed for; None where the endpoint does not say."""


class UnusableError(ValueError):
    """A body is no chat completion with one text. The message says in which way."""


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)


class _Message(_Part):
    content: str | None = None
    refusal: str | None = None


class _Option(_Part):
    message: _Message


class _Body(_Part):
    id: str = Field(min_length=1)
    model: str
    choices: list[_Option]
    usage: Any = None


class _Usage(_Part):
    # Far above any model's context; what a broken server may claim must not overflow a sum.
    prompt_tokens: int = Field(ge=0, le=10**9)
    completion_tokens: int = Field(ge=0, le=10**9)


def read_answer(body: str, redact: Redact) -> Answer:
    """The answer in a body from which the key was cut out.

    Args:
        body: of a reply with status 200.
        redact: cuts the key out of the texts inside as well, of which JSON's escapes are undone by then.

    Raises:
        UnusableError: it is no JSON, no chat completion, or holds another number of texts than one.
    """
    try:
        content = _Body.model_validate(json.loads(body))
    except ValidationError as error:
        place = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise UnusableError(f"no chat completion (look at {place or 'its JSON'})") from None
    except (ValueError, RecursionError):
        raise UnusableError("its body is no JSON") from None
    if len(content.choices) != 1:
        raise UnusableError(f"{len(content.choices)} choices instead of 1")
    message = content.choices[0].message
    text = message.refusal if message.content is None else message.content
    if text is None:
        raise UnusableError("neither content nor refusal")
    return Answer(_clean(content.id, redact), _clean(text, redact), _clean(content.model, redact), _read(content.usage))


def shorten(body: str, redact: Redact) -> str:
    """What a server says about an error, in one short line, without the key."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        content = None
    error = content.get("error", content) if isinstance(content, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    text = message if isinstance(message, str) else body
    line = "".join(letter if letter.isprintable() else " " for letter in _clean(text, redact))
    line = redact(" ".join(line.split()))
    return line if len(line) <= MAX_SHOWN else f"{line[:MAX_SHOWN]}…"


def _clean(text: str, redact: Redact) -> str:
    """Without the key, and without halves of surrogate pairs, which JSON can name and no file can hold."""
    return redact(text.encode("utf-8", errors="replace").decode())


def _read(usage: Any) -> Tokens | None:
    try:
        content = _Usage.model_validate(usage)
    except ValidationError:
        return None
    return Tokens(content.prompt_tokens, content.completion_tokens)
