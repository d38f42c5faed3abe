"""Text becomes token ids here and nowhere else: chat template, end-of-sequence token, length limits."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from stages.common.errors import InputError
from stages.data.records import Message, Prompt, TooLong

Ids = tuple[int, ...]
ItemT = TypeVar("ItemT")

logger = logging.getLogger(__name__)

SHOWN = 60
"""Characters of a completion in an error."""


@dataclass(frozen=True)
class TokenSequence:
    """A prompt and a completion as token ids."""

    prompt_ids: Ids
    completion_ids: Ids
    """Ends with the end-of-sequence token unless the completion was cut."""

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True)
class LengthReport:
    """What happened to samples longer than the limit."""

    num_samples: int
    num_dropped: int
    num_truncated: int


TODAY = datetime(2024, 7, 26)  # a date on a page, in no time zone
"""The day that chat templates are told it is, whatever day it is: token ids must not change at midnight. Llama 3's
own templates write this day where they are told none."""


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> Ids:
    """The prompt's messages in the chat template, up to where the completion starts.

    Raises:
        InputError: the template refuses these messages.
    """
    text = write_prompt(tokenizer, prompt.messages, f"prompt {prompt.prompt_id}")
    # The template writes the special tokens itself; adding them again would double the first one.
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def write_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], name: str, template: str | None = None
) -> str:
    """The messages in the chat template, up to where the completion starts, as text.

    Args:
        tokenizer: whose template it is.
        messages: of the prompt.
        name: of the prompt, for the message.
        template: in place of the tokenizer's own.

    Raises:
        InputError: the template refuses these messages.
    """
    try:
        text = tokenizer.apply_chat_template(
            [{"role": message.role, "content": message.content} for message in messages],
            chat_template=template,
            tokenize=False,
            add_generation_prompt=True,
            strftime_now=TODAY.strftime,
        )
    except TemplateError as error:
        roles = ", ".join(message.role for message in messages)
        raise InputError(
            f"{name}: the model's chat template refuses messages of {roles}: {error}; change the prompts (data.task), "
            "or set model.chat_template to 'plain' where the model is a base model"
        ) from error
    return str(text)


def encode_completion(tokenizer: PreTrainedTokenizerBase, completion: str) -> Ids:
    """The completion and the one end-of-sequence token that finishes it, which the text may spell itself.

    The end-of-sequence token is appended by id, so it stays in the loss even where it doubles as padding.

    Raises:
        InputError: the text spells that token before its end, where sampling would have ended.
    """
    ids = tokenizer(completion, add_special_tokens=False)["input_ids"]
    eos: int = tokenizer.eos_token_id
    if ids and ids[-1] == eos:
        ids = ids[:-1]
    if eos in ids:
        shown = completion if len(completion) <= SHOWN else f"{completion[:SHOWN]}..."
        raise InputError(
            f"completion {shown!r}: holds the end-of-sequence token {tokenizer.eos_token!r} before its end; cut it "
            "there, or take the token out"
        )
    return (*ids, eos)


def decode_completion(tokenizer: PreTrainedTokenizerBase, token_ids: Iterable[int]) -> str:
    """The completion as a scorer or a person reads it, without special tokens."""
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=True))


def limit_lengths(
    items: Iterable[ItemT],
    sequences: Callable[[ItemT], list[TokenSequence]],
    rebuild: Callable[[ItemT, list[TokenSequence]], ItemT],
    *,
    max_tokens: int,
    too_long: TooLong,
) -> tuple[list[ItemT], LengthReport]:
    """Drop or truncate items (examples, pairs) with a sequence over the limit, and count both.

    Truncation keeps the end of the prompt out of it: completions are cut at the right and lose their
    end-of-sequence token; an item whose prompt alone fills the limit is dropped.
    """
    kept: list[ItemT] = []
    num_samples = num_dropped = num_truncated = 0
    for item in items:
        num_samples += 1
        parts = sequences(item)
        if all(len(part) <= max_tokens for part in parts):
            kept.append(item)
        elif too_long == "drop" or any(len(part.prompt_ids) >= max_tokens for part in parts):
            num_dropped += 1
        else:
            num_truncated += 1
            kept.append(rebuild(item, [_truncate(part, max_tokens) for part in parts]))
    return kept, LengthReport(num_samples, num_dropped, num_truncated)


def require_kept(artifact: str, kind: str, lengths: LengthReport, split: str, limit: str) -> None:
    """Refuse a split of which nothing is left, and say what is lost of one that is only looked at.

    Args:
        artifact: where the samples are.
        kind: what they are, in the plural.
        lengths: what happened to them.
        split: its name.
        limit: setting and value.

    Raises:
        InputError: the split was empty, or everything in it is too long.
    """
    if not lengths.num_samples:
        raise InputError(f"{artifact}: split {split} has no {kind}; it needs one at least")
    if lengths.num_dropped == lengths.num_samples:
        raise InputError(
            f"{artifact}: none of {lengths.num_samples} {kind} of split {split} fits into {limit}; raise it"
        )
    if split != "train" and lengths.num_dropped:
        logger.warning(
            "%s: %d of %d %s of split %s are not looked at, longer than %s",
            artifact,
            lengths.num_dropped,
            lengths.num_samples,
            kind,
            split,
            limit,
        )


def _truncate(sequence: TokenSequence, max_tokens: int) -> TokenSequence:
    room = max_tokens - len(sequence.prompt_ids)
    return TokenSequence(sequence.prompt_ids, sequence.completion_ids[:room])
