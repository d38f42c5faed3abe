"""What the ledger records: its header, and a row of each table."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import pyarrow

from stages.common.errors import InputError

FORMAT = 3

Table = Literal["samples", "updates", "events"]
TABLES: tuple[Table, ...] = ("samples", "updates", "events")

GroupKey = tuple[int, int]
"""Ticket and attempt."""

EventKind = Literal["published", "lost", "dropped", "discarded", "evaluated", "resumed"]
"""published: weights were handed to the generators. lost: an attempt gave nothing usable. dropped: a finished attempt
was thrown away. discarded: a ticket was given up for good. evaluated: a version on the validation prompts. resumed: the
run went on from a checkpoint."""


@dataclass(frozen=True)
class LedgerHeader:
    """The settings that a ledger is checked against; the same from the first row to the last."""

    max_staleness: int
    """k, in updates."""
    updates_per_rollout: int
    """N, mini-batches of a rollout."""
    epochs_per_rollout: int
    """T, times each mini-batch is trained on."""
    prompts_per_update: int
    """Groups of a mini-batch."""
    num_updates: int
    """Of the whole run."""
    samples_per_prompt: int
    """K."""
    with_greedy: bool
    """Whether a group has a greedy completion besides."""
    weight_update: str
    """How generators take new weights: drain or in_flight."""
    seed: int
    num_prompts: int
    """Prompts of one pass."""
    prompts_hash: str
    model_hash: str
    """Of the weights of version 0."""
    temperature: float
    """Of sampling; the recorded log-probabilities are of logits that were divided by it."""
    format: int = FORMAT

    @property
    def cycle(self) -> int:
        """U = N·T, updates of a rollout."""
        return self.updates_per_rollout * self.epochs_per_rollout

    def to_json(self) -> dict[str, Any]:
        """As `ledger.json` holds it."""
        return {"format": self.format, **asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "LedgerHeader":
        """From what `to_json` gave.

        Raises:
            InputError: another format, an offline run's, or keys that are missing or unknown.
        """
        if data.get("format") != FORMAT:
            raise InputError(f"format is {data.get('format')!r}, only {FORMAT} can be read")
        if data.get("offline"):
            raise InputError("is of an offline run: nothing was sampled, so there is nothing to read or to replay")
        wrong = sorted(set(data) ^ {field.name for field in fields(cls)})
        if wrong:
            raise InputError(f"keys are missing or unknown: {', '.join(wrong)}")
        return cls(**data)


@dataclass(frozen=True, slots=True)
class TrainedRow:
    """One sample of a mini-batch in one update; in several units of that update, one row for each."""

    update: int
    """Made by weights of this version."""
    rollout: int
    mini_batch: int
    """Within the rollout."""
    epoch: int
    ticket: int
    attempt: int
    sample_index: int
    is_greedy: bool
    score: float
    """With the missing-EOS rule applied."""
    staleness: int
    """`update` less the version of the first token."""
    unit: int | None = None
    """Number in the update; a pair's samples share it. None, as all below, where the sample was not chosen."""
    micro_batch: int | None = None
    place: int | None = None
    """Row in the micro-batch."""
    advantage: float | None = None
    """None for algorithms on pairs."""
    reference_logprobs: tuple[float, ...] | None = None
    """In nats, one per completion token; None if the algorithm needs none."""
    proximal_logprobs: tuple[float, ...] | None = None
    """The same of the proximal policy; None unless the objective needs them."""
    values: tuple[float, ...] | None = None
    """The value model's before it trained on the mini-batch, one per completion token; None without one."""

    @property
    def key(self) -> GroupKey:
        """The group it belongs to."""
        return self.ticket, self.attempt


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to the weights, an attempt, a ticket or the run."""

    kind: EventKind
    update: int
    """The learner's version when it happened; of `published`, the updates the ledger had by then."""
    policy_version: int | None = None
    ticket: int | None = None
    attempt: int | None = None
    reason: str | None = None
    """lost: replica_lost, timeout, unusable_answer. dropped: stale. discarded: no_signal."""
    detail: str | None = None
    """JSON."""


_LOGPROBS = pyarrow.list_(pyarrow.float64())  # what was a Python float is the same one when read back

SCHEMAS: dict[Table, Any] = {
    "samples": pyarrow.schema(
        [
            ("ticket", pyarrow.int64()),
            ("attempt", pyarrow.int32()),
            ("prompt_id", pyarrow.string()),
            ("sample_index", pyarrow.int32()),
            ("is_greedy", pyarrow.bool_()),
            ("prompt_ids", pyarrow.list_(pyarrow.int32())),
            ("token_ids", pyarrow.list_(pyarrow.int32())),
            ("sampling_logprobs", _LOGPROBS),
            ("token_policy_versions", pyarrow.list_(pyarrow.int32())),
            ("is_finished", pyarrow.bool_()),
            ("text", pyarrow.string()),
            ("replica", pyarrow.string()),
        ]
    ),
    "updates": pyarrow.schema(
        [
            ("update", pyarrow.int64()),
            ("rollout", pyarrow.int64()),
            ("mini_batch", pyarrow.int32()),
            ("epoch", pyarrow.int32()),
            ("ticket", pyarrow.int64()),
            ("attempt", pyarrow.int32()),
            ("sample_index", pyarrow.int32()),
            ("is_greedy", pyarrow.bool_()),
            ("score", pyarrow.float64()),
            ("staleness", pyarrow.int32()),
            ("unit", pyarrow.int32()),
            ("micro_batch", pyarrow.int32()),
            ("place", pyarrow.int32()),
            ("advantage", pyarrow.float64()),
            ("reference_logprobs", _LOGPROBS),
            ("proximal_logprobs", _LOGPROBS),
            ("values", _LOGPROBS),
        ]
    ),
    "events": pyarrow.schema(
        [
            ("kind", pyarrow.string()),
            ("update", pyarrow.int64()),
            ("policy_version", pyarrow.int64()),
            ("ticket", pyarrow.int64()),
            ("attempt", pyarrow.int32()),
            ("reason", pyarrow.string()),
            ("detail", pyarrow.string()),
        ]
    ),
}
"""Columns of each table; docs/ledger.md explains them."""
