"""Text becomes token ids here and nowhere else: chat template, end-of-sequence token, length limits."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from stages.data.records import Prompt, TooLong

Ids = tuple[int, ...]
ItemT = TypeVar("ItemT")


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


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> Ids:
    """The prompt's messages in the chat template, up to where the completion starts."""
    messages = [{"role": message.role, "content": message.content} for message in prompt.messages]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # The template writes the special tokens itself; adding them again would double the first one.
    return tuple(tokenizer(str(text), add_special_tokens=False)["input_ids"])


def encode_completion(tokenizer: PreTrainedTokenizerBase, completion: str) -> Ids:
    """The completion and the end-of-sequence token that finishes it.

    The end-of-sequence token is appended by id, so it stays in the loss even where it doubles as padding.
    """
    ids = tokenizer(completion, add_special_tokens=False)["input_ids"]
    eos: int = tokenizer.eos_token_id
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


def _truncate(sequence: TokenSequence, max_tokens: int) -> TokenSequence:
    room = max_tokens - len(sequence.prompt_ids)
    return TokenSequence(sequence.prompt_ids, sequence.completion_ids[:room])
