"""Split a task's data: whole groups, by seed, whatever the order of the rows.

A group (a shared opening, a shared first message) never lies in two splits, so a score on held-out
prompts says something about prompts unlike those of training. Demonstrations and pairs go where
their prompt goes.
"""

import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from stages.common.errors import SettingError
from stages.data.config import DataConfig
from stages.data.records import SPLITS, Demonstration, Pair, Prompt, Split
from stages.data.tasks.task import TaskData

RecordT = TypeVar("RecordT", Demonstration, Pair)


@dataclass(frozen=True)
class SplitData:
    """What one split holds."""

    prompts: list[Prompt]
    demonstrations: list[Demonstration]
    pairs: list[Pair] | None
    """None: the task has no pairs labelled by people."""


@dataclass(frozen=True)
class PreparedData:
    """All splits, and what was dropped on the way."""

    splits: dict[Split, SplitData]
    num_rows: int
    num_duplicate_rows: int
    num_bad_rows: int
    num_duplicate_prompts: int
    """Prompts equal to another one: the same conversation in several rows."""
    num_unused_prompts: int
    """Prompts in no split: the rest of a group cut to size, and training prompts above the limit."""
    answers: Mapping[str, str] | None = None
    """The number that solves each prompt of any split, by prompt_id; None for a task without a rule."""

    def metrics(self) -> dict[str, float]:
        """The counts under the names of docs/metrics.md."""
        counts = {
            "data/rows": self.num_rows,
            "data/duplicate_rows": self.num_duplicate_rows,
            "data/bad_rows": self.num_bad_rows,
            "data/duplicate_prompts": self.num_duplicate_prompts,
            "data/unused_prompts": self.num_unused_prompts,
        }
        for split, data in self.splits.items():
            counts[f"data/prompts/{split}"] = len(data.prompts)
            counts[f"data/groups/{split}"] = len({prompt.group for prompt in data.prompts})
            counts[f"data/demonstrations/{split}"] = len(data.demonstrations)
            counts[f"data/pairs/{split}"] = len(data.pairs or [])
        return {name: float(count) for name, count in counts.items()}


def prepare_data(task_data: TaskData, config: DataConfig) -> PreparedData:
    """Drop duplicate prompts and split the rest by group.

    Raises:
        SettingError: too few prompts or groups for the sizes asked for.
    """
    prompts = drop_duplicates(task_data.prompts)
    members = split_prompts(prompts, config)
    splits = {split: _select(task_data, members[split]) for split in SPLITS}
    return PreparedData(
        splits=splits,
        num_rows=task_data.num_rows,
        num_duplicate_rows=task_data.num_duplicate_rows,
        num_bad_rows=task_data.num_bad_rows,
        num_duplicate_prompts=len(task_data.prompts) - len(prompts),
        num_unused_prompts=len(prompts) - sum(len(data.prompts) for data in splits.values()),
        answers=_select_answers(task_data.answers, splits.values()),
    )


def drop_duplicates(prompts: Iterable[Prompt]) -> list[Prompt]:
    """One prompt per conversation, sorted by id, so that the order of rows leaves no trace."""
    # Sorting by group too decides which one stays, should two tasks' rules group one text differently.
    unique = {prompt.prompt_id: prompt for prompt in sorted(prompts, key=lambda p: (p.prompt_id, p.group))}
    return list(unique.values())


def split_prompts(prompts: Sequence[Prompt], config: DataConfig) -> dict[Split, list[Prompt]]:
    """Give groups to heldout, then validation, then train.

    Heldout and validation get exactly the size asked for: whole groups in random order as long as
    they fit, then part of one more, whose rest is unused.

    Raises:
        SettingError: too few prompts or groups for the sizes asked for.
    """
    generator = random.Random(config.seed)
    groups: dict[str, list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        groups[prompt.group].append(prompt)
    order = sorted(groups)
    generator.shuffle(order)
    remaining = {group: groups[group] for group in order}
    heldout = _take_groups(remaining, config.num_heldout_prompts)
    validation = _take_groups(remaining, config.num_validation_prompts)
    train = [prompt for group in remaining.values() for prompt in group]
    generator.shuffle(train)
    wanted = config.num_heldout_prompts, config.num_validation_prompts
    if not train or (len(heldout), len(validation)) != wanted:
        raise SettingError(
            f"data.num_heldout_prompts={wanted[0]} and data.num_validation_prompts={wanted[1]} are too many: "
            f"the task has {len(prompts)} different prompts in {len(groups)} groups, a group is never "
            "split, and one must be left for training; lower them or add prompts"
        )
    return {"train": train[: config.max_train_prompts], "validation": validation, "heldout": heldout}


def _take_groups(remaining: dict[str, list[Prompt]], size: int) -> list[Prompt]:
    """Move groups out of `remaining` until `size` prompts are taken or none remain."""
    taken: list[Prompt] = []
    for group in list(remaining):
        if len(taken) + len(remaining[group]) <= size:
            taken += remaining.pop(group)
    if len(taken) < size and remaining:
        # Every group left is larger than the gap: the smallest one wastes the fewest prompts.
        smallest = min(remaining, key=lambda group: len(remaining[group]))
        taken += remaining.pop(smallest)[: size - len(taken)]
    return taken


def _select(task_data: TaskData, prompts: list[Prompt]) -> SplitData:
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    pairs = task_data.pairs
    return SplitData(
        prompts=prompts,
        demonstrations=_follow(task_data.demonstrations, by_id),
        pairs=None if pairs is None else _follow(pairs, by_id),
    )


def _select_answers(answers: Mapping[str, str] | None, splits: Iterable[SplitData]) -> dict[str, str] | None:
    if answers is None:
        return None
    return {prompt.prompt_id: answers[prompt.prompt_id] for data in splits for prompt in data.prompts}


def _follow(records: Sequence[RecordT], by_id: dict[str, Prompt]) -> list[RecordT]:
    """The different records of these prompts, in an order that does not depend on the rows'."""
    chosen = {record for record in records if record.prompt.prompt_id in by_id}
    return sorted(chosen, key=_sort_key)


def _sort_key(record: Demonstration | Pair) -> tuple[str, ...]:
    if isinstance(record, Pair):
        return record.prompt.prompt_id, record.chosen, record.rejected
    return record.prompt.prompt_id, record.completion
