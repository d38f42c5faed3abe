"""Transcripts as in HH-RLHF: turns that begin with a blank line and `Human:` or `Assistant:`."""

import re
from typing import Literal

from stages.common.errors import InputError
from stages.data.records import Message

TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
ROLES: dict[str, Literal["user", "assistant"]] = {"Human": "user", "Assistant": "assistant"}


def find_opening(prompt: str) -> str:
    """What all cuts of one conversation begin with: the first turn where a prompt is a transcript, else all of it."""
    before, *parts = TURN.split(prompt.strip())
    return f"{before}{parts[1]}".strip() if parts else prompt


def split_transcript(transcript: str, place: str) -> tuple[tuple[Message, ...], str]:
    """The turns before the last one as a prompt, and the last one, the assistant's, as completion.

    Args:
        transcript: the conversation; white space around a turn is no part of it.
        place: file, line and column, for the message.

    Raises:
        InputError: text before the first turn, a first turn that is not the human's, fewer than two turns, an empty
            turn, two turns of one role in a row, or a last turn that is not the assistant's.
    """
    before, *parts = TURN.split(transcript.strip())
    turns = [Message(ROLES[speaker], text.strip()) for speaker, text in zip(parts[::2], parts[1::2], strict=True)]
    if before.strip() or not turns:
        raise InputError(f"{place}: does not begin with 'Human:'; expected a transcript of turns")
    if turns[-1].role != "assistant" or len(turns) < 2:
        raise InputError(f"{place}: has no last turn 'Assistant:' after a prompt; expected one to learn from")
    if turns[0].role != "user":
        raise InputError(f"{place}: begins with 'Assistant:'; expected 'Human:', as chat templates do")
    for number, turn in enumerate(turns, start=1):
        if not turn.content:
            raise InputError(f"{place}: turn {number} of {len(turns)} is empty; expected text")
        if number > 1 and turn.role == turns[number - 2].role:
            raise InputError(
                f"{place}: turns {number - 1} and {number} are both the {turn.role}'s; expected both roles by turns"
            )
    return tuple(turns[:-1]), turns[-1].content
