"""Token sequences become padded tensors and micro-batches of similar length.

Shapes: B sequences, S tokens of prompt and completion, T tokens of the longest completion; right-padded.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.data.text import TokenSequence


@dataclass(frozen=True)
class SharedPrompts:
    """Which rows have the same prompt. G prompts"""

    rows: Tensor
    """A row of each prompt. [G]"""
    owner: Tensor
    """The prompt of each row. [B]"""


@dataclass(frozen=True)
class TrunkStates:
    """What the lower blocks of a model give for a batch. H hidden size"""

    depth: int
    """How many blocks."""
    states: tuple[Tensor, ...]
    """Of whole rows; or, with shared prompts, of the G prompts and then of the completions. [B, S, H]"""


@dataclass(frozen=True)
class SequenceBatch:
    """Prompts with their completions, padded on the right."""

    input_ids: Tensor
    """Prompt, completion, padding. [B, S]"""
    attention_mask: Tensor
    """True on real tokens. [B, S]"""
    completion_ids: Tensor
    """The completions alone. [B, T]"""
    completion_mask: Tensor
    """True on completion tokens, the end-of-sequence token included. [B, T]"""
    prompt_lengths: Tensor
    """[B]"""
    prompts: SharedPrompts | None = None
    """None: every row is read whole."""
    trunk: TrunkStates | None = None
    """None: forward passes begin with the tokens."""

    @property
    def num_computed_tokens(self) -> int:
        """Padded tokens of a forward pass."""
        if self.prompts is None:
            return self.input_ids.numel()
        longest = int(self.prompt_lengths.max())
        return len(self.prompts.rows) * longest + self.completion_ids.numel()

    def __len__(self) -> int:
        return self.input_ids.shape[0]


def collate(
    sequences: Sequence[TokenSequence], device: torch.device | str = "cpu", *, share_prompts: bool = False
) -> SequenceBatch:
    """Pad sequences to tensors. Padding is id 0 everywhere: nothing reads it, masks come from lengths.

    Args:
        sequences: the rows.
        device: of the tensors.
        share_prompts: read a prompt that several rows have only once.
    """
    num_tokens = max(len(sequence) for sequence in sequences)
    num_completion_tokens = max(len(sequence.completion_ids) for sequence in sequences)
    input_ids = torch.zeros(len(sequences), num_tokens, dtype=torch.long)
    completion_ids = torch.zeros(len(sequences), num_completion_tokens, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids = torch.tensor(sequence.prompt_ids + sequence.completion_ids)
        input_ids[row, : len(ids)] = ids
        completion_ids[row, : len(sequence.completion_ids)] = ids[len(sequence.prompt_ids) :]
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    prompt_lengths = torch.tensor([len(sequence.prompt_ids) for sequence in sequences])
    return SequenceBatch(
        input_ids=input_ids.to(device),
        attention_mask=(torch.arange(num_tokens) < lengths[:, None]).to(device),
        completion_ids=completion_ids.to(device),
        completion_mask=(torch.arange(num_completion_tokens) < (lengths - prompt_lengths)[:, None]).to(device),
        prompt_lengths=prompt_lengths.to(device),
        prompts=_find_shared(sequences, device) if share_prompts else None,
    )


def _find_shared(sequences: Sequence[TokenSequence], device: torch.device | str) -> SharedPrompts:
    number: dict[tuple[int, ...], int] = {}
    owner = [number.setdefault(tuple(sequence.prompt_ids), len(number)) for sequence in sequences]
    rows = [owner.index(prompt) for prompt in range(len(number))]
    return SharedPrompts(torch.tensor(rows, device=device), torch.tensor(owner, device=device))


def split_by_tokens(lengths: Sequence[int], max_tokens: int, multiple_of: int = 1) -> list[list[int]]:
    """Group indices into micro-batches of similar length, each at most `max_tokens` padded tokens.

    Longest first, so that the largest micro-batch, the one that may not fit in memory, comes first. A single
    sequence longer than `max_tokens` gets a micro-batch of its own.

    Args:
        lengths: tokens of each sequence.
        max_tokens: of one micro-batch.
        multiple_of: the number of micro-batches, as far as there are sequences for it: ranks share them evenly.
    """
    groups: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not groups or (len(groups[-1]) + 1) * longest > max_tokens:
            groups.append([])
            longest = lengths[index]
        groups[-1].append(index)
    # The longest sequence of a group comes first.
    return _cut(groups, lambda group: len(group) * lengths[group[0]], multiple_of)


@dataclass(frozen=True)
class SharedSize:
    """What a unit of training adds to a micro-batch that reads each prompt once."""

    prompt: int
    """Which prompt it is of."""
    prompt_tokens: int
    rows: int
    """Completions that stay together, all of that prompt."""
    completion_tokens: int
    """Of the longest one."""


def count_shared(sizes: Sequence[SharedSize]) -> int:
    """Padded tokens of a micro-batch that holds these units and each of their prompts once."""
    prompts = len({size.prompt for size in sizes}) * max(size.prompt_tokens for size in sizes)
    return prompts + sum(size.rows for size in sizes) * max(size.completion_tokens for size in sizes)


def split_by_prompts(sizes: Sequence[SharedSize], max_tokens: int, multiple_of: int = 1) -> list[list[int]]:
    """`split_by_tokens` for shared prompts: units of one prompt stay together as far as `max_tokens` lets them.

    Args:
        sizes: of the units.
        max_tokens: padded tokens of one micro-batch, a prompt counted once. A larger unit has one of its own.
        multiple_of: the number of micro-batches, as far as there are units for it.
    """

    def count(units: Sequence[int]) -> int:
        return count_shared([sizes[unit] for unit in units])

    of_prompt: dict[int, list[int]] = {}
    for unit, size in enumerate(sizes):
        of_prompt.setdefault(size.prompt, []).append(unit)
    groups: list[list[int]] = []
    for units in sorted(of_prompt.values(), key=lambda units: (-count(units), units[0])):
        if groups and count([*groups[-1], *units]) <= max_tokens:
            groups[-1] += units
            continue
        groups.append([])
        for unit in units:
            if groups[-1] and count([*groups[-1], unit]) > max_tokens:
                groups.append([])
            groups[-1].append(unit)
    return _cut(groups, count, multiple_of)


def _cut(groups: list[list[int]], count: Callable[[list[int]], int], multiple_of: int) -> list[list[int]]:
    """Halve the group of most tokens until the number of groups is a multiple, or no group can be halved."""
    while len(groups) % multiple_of and any(len(group) > 1 for group in groups):
        place = max(range(len(groups)), key=lambda i: (len(groups[i]) > 1, count(groups[i])))
        group = groups[place]
        groups[place : place + 1] = [group[: len(group) // 2], group[len(group) // 2 :]]
    return groups


def length_grouped_batches(lengths: Sequence[int], batch_size: int, seed: int) -> Iterator[list[int]]:
    """One epoch of shuffled batches whose members have similar lengths (little padding).

    Shuffled, cut into chunks of 16 batches, each chunk sorted by length and cut into batches, which are
    shuffled again. The last batch may be smaller; none is dropped.
    """
    rng = random.Random(seed)
    order = list(range(len(lengths)))
    rng.shuffle(order)
    batches: list[list[int]] = []
    chunk = 16 * batch_size
    for start in range(0, len(order), chunk):
        by_length = sorted(order[start : start + chunk], key=lambda i: lengths[i])
        batches += [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
    rng.shuffle(batches)
    yield from batches
