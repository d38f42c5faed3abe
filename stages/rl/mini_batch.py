"""One mini-batch: scored groups in, micro-batches and ledger rows out; and back again from the ledger."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from torch import Tensor

from stages.common.errors import InputError, RunError
from stages.common.metrics import Mean
from stages.data.records import Completion
from stages.generation.protocol import Group, Ticket
from stages.learner.ranks import ALONE, Ranks
from stages.rl.algorithms.protocol import Algorithm
from stages.rl.ledger.reader import LedgerReader, RecordedUpdate
from stages.rl.ledger.schema import GroupKey, TrainedRow
from stages.rl.records import Totals, Unit
from stages.rl.rollouts import (
    Budget,
    Lookups,
    Member,
    MicroBatch,
    Reference,
    build_micro_batches,
    build_rollout,
    complete_advantages,
    describe_rollout,
    split_units,
)
from stages.rl.scorer import score_completions
from stages.rl.scoring import ScoredGroup
from stages.rl.value import ValueModel
from stages.scoring.protocol import Scorer


@dataclass(frozen=True)
class Sampled:
    """A ticket's completions, with what was computed for them where they were sampled."""

    ticket: Ticket
    group: Group
    scored: ScoredGroup | None = None

    @property
    def policy_version(self) -> int:
        """Of the oldest first token in the group."""
        return min(completion.first_policy_version for completion in self.group)


@dataclass(frozen=True)
class MiniBatch:
    """What one update trains on, in every epoch of its rollout."""

    micro_batches: list[MicroBatch]
    num_units: int
    rows: list[TrainedRow]
    """Of its first update."""
    metrics: dict[str, Mean]

    @property
    def totals(self) -> Totals:
        """Normalisers of its loss."""
        masks = [micro_batch.inputs.completion_mask for micro_batch in self.micro_batches]
        return Totals(self.num_units, sum(int(mask.sum()) for mask in masks))

    def rows_of(self, update: int, epoch: int) -> list[TrainedRow]:
        """Ledger rows of one of its updates."""
        return [
            replace(row, update=update, epoch=epoch, staleness=row.staleness + update - row.update) for row in self.rows
        ]


@dataclass(frozen=True)
class Preparation:
    """How groups become mini-batches."""

    algorithm: Algorithm
    scorer: Scorer | None
    """None: groups come with their scores."""
    missing_eos_score: float
    reference: Reference | None
    """None: the algorithm does without, or completions come with its log-probabilities."""
    learner: Reference
    """The learner as it is, for proximal log-probabilities."""
    max_tokens: int
    """Padded tokens of a micro-batch."""
    value: ValueModel | None = None
    """The value model as it is, if the algorithm needs one."""
    ranks: Ranks = ALONE
    """That have these models."""
    share_prompts: bool = False
    """Whether a prompt is read once for all its completions in a micro-batch."""

    def score(self, sampled: Sequence[Sampled]) -> list[float]:
        """One score per completion, group after group."""
        if self.scorer is None:
            return [score for item in sampled for score in _scored(item).scores]
        completions = [completion for item in sampled for completion in item.group]
        cut = self.algorithm.greedy_max_tokens
        return score_completions(self.scorer, completions, self.missing_eos_score, greedy_max_tokens=cut)

    def prepare(
        self, sampled: Sequence[Sampled], scores: Sequence[float], place: tuple[int, int, int]
    ) -> MiniBatch | None:
        """Lay the groups of one update out, or None where they hold nothing to learn from.

        Args:
            sampled: in the order of tickets.
            scores: one per completion, group after group.
            place: the update, its rollout, and the mini-batch's number in it.
        """
        groups = [item.group for item in sampled]
        units, metrics = self.algorithm.select(build_rollout(groups, scores))
        if not units:
            return None
        completions = [completion for group in groups for completion in group]
        tickets = [item.ticket.number for item in sampled for _ in item.group]
        reference = _reference_logprobs(sampled)
        budget = Budget(self.max_tokens, self.ranks.size, self.share_prompts)
        split = split_units(completions, tickets, units, reference, budget)
        micro_batches, shaping = self.build(split)
        layout = list(zip(split, micro_batches, strict=True))
        rows = [_describe(item, completion, place) for item in sampled for completion in item.group]
        rows = [replace(row, score=score) for row, score in zip(rows, scores, strict=True)]
        return MiniBatch(
            micro_batches,
            len(units),
            self._add_units(rows, layout),
            metrics | shaping | describe_rollout(groups, scores),
        )

    def build(self, split: Sequence[Sequence[Member]]) -> tuple[list[MicroBatch], dict[str, Mean]]:
        """Tensors of every micro-batch, and metrics of their advantages.

        Raises:
            RunError: the algorithm needs log-probabilities of a reference that nobody has computed.
        """
        if self.algorithm.needs_reference and self.reference is None:
            _require_reference(split)
        lookups = Lookups(
            self.reference if self.algorithm.needs_reference else None,
            self.learner if self.algorithm.needs_proximal else None,
            self.value if self.algorithm.value_model else None,
            self.reference or self.learner,
        )
        micro_batches = build_micro_batches(split, lookups, self.ranks, share_prompts=self.share_prompts)
        return complete_advantages(micro_batches, self.algorithm)

    def _add_units(
        self, rows: Sequence[TrainedRow], layout: Sequence[tuple[Sequence[Member], MicroBatch]]
    ) -> list[TrainedRow]:
        """Say which rows were chosen, and where they stand."""
        chosen: dict[int, list[TrainedRow]] = {}
        for number, (members, micro_batch) in enumerate(layout):
            inputs, masks = micro_batch.inputs, micro_batch.inputs.completion_mask
            for place, member in enumerate(members):
                row = replace(
                    rows[member.row],
                    unit=member.unit,
                    micro_batch=number,
                    place=place,
                    advantage=member.advantage,
                    reference_logprobs=_values(inputs.reference_logprobs, place, masks)
                    if self.algorithm.needs_reference
                    else None,
                    proximal_logprobs=_values(inputs.proximal_logprobs, place, masks),
                    values=_values(inputs.values, place, masks),
                )
                chosen.setdefault(member.row, []).append(row)
        return [row for number, plain in enumerate(rows) for row in chosen.get(number, [plain])]


def describe_staleness(values: Sequence[int]) -> dict[str, Mean]:
    """Metrics of how stale the samples of an update are, those not chosen included."""
    return {"rollout/staleness": Mean(sum(values), len(values)), "rollout/staleness/max": Mean(max(values), 1)}


def rebuild_mini_batch(
    recorded: RecordedUpdate, ledger: LedgerReader, preparation: Preparation, *, is_resumed: bool
) -> MiniBatch:
    """The mini-batch of a recorded update, bit for bit.

    Args:
        recorded: the update.
        ledger: its samples.
        preparation: models and algorithm of this run.
        is_resumed: whether proximal log-probabilities and values are those on record, as the learner has trained on
            these samples since; else they are this learner's own.

    Raises:
        InputError: the algorithm chooses or weights other completions than the recorded one did, or needs
            log-probabilities of the reference that are not on record.
    """
    groups = ledger.groups(recorded.keys)
    completions = {(key, item.sample_index, item.is_greedy): item for key, group in groups.items() for item in group}
    chosen = sorted(
        (row for row in recorded.rows if row.micro_batch is not None), key=lambda row: (row.micro_batch, row.place)
    )
    split = [
        [_recorded_member(row, completions[row.key, row.sample_index, row.is_greedy], is_resumed) for row in rows]
        for _, rows in groupby(chosen, key=lambda row: row.micro_batch)
    ]
    needs_reference = preparation.algorithm.needs_reference and preparation.reference is None
    if needs_reference and any(row.reference_logprobs is None for row in chosen):
        raise InputError(
            f"rl.replay_from: update {recorded.update} was recorded without log-probabilities of the reference, which "
            "rl.algorithm needs now (kl_coef or kl_loss_coef above 0); set it as it was"
        )
    # Scores of each group in the order of its completions; a sample in two units has two rows.
    unique = {(row.key, row.sample_index, row.is_greedy): row for row in recorded.rows}
    scores = [unique[key].score for key in completions]
    units, metrics = preparation.algorithm.select(build_rollout(list(groups.values()), scores))
    _require_same_units(recorded, units, list(completions))
    micro_batches, shaping = preparation.build(split)
    metrics |= shaping | describe_rollout(list(groups.values()), scores)
    return MiniBatch(micro_batches, recorded.num_units, list(recorded.rows), metrics)


def _require_same_units(
    recorded: RecordedUpdate, units: Sequence[Unit], keys: Sequence[tuple[GroupKey, int, bool]]
) -> None:
    """What a loss means by a unit's place and its advantage is its own algorithm's.

    Args:
        recorded: the update.
        units: what this run's algorithm makes of the same scores.
        keys: of the update's completions, in the order of the units' rows.
    """
    found = {(row.unit, row.key, row.sample_index, row.is_greedy, row.advantage) for row in recorded.rows}
    wanted = {
        (number, *keys[row], advantage)
        for number, unit in enumerate(units)
        for row, advantage in zip(unit.rows, unit.advantages or (None,) * len(unit.rows), strict=True)
    }
    if {member for member in found if member[0] is not None} != wanted:
        raise InputError(
            f"rl.replay_from: update {recorded.update} was recorded with another rl.algorithm, or other settings of "
            "it: it chose other completions or weighted them in another way; set them as they were"
        )


def _recorded_member(row: TrainedRow, completion: Completion, is_resumed: bool) -> Member:
    assert row.unit is not None
    return Member(
        row=-1,
        unit=row.unit,
        group=row.ticket,
        completion=completion,
        advantage=row.advantage,
        reference_logprobs=row.reference_logprobs,
        proximal_logprobs=row.proximal_logprobs if is_resumed else None,
        values=row.values if is_resumed else None,
    )


def _describe(item: Sampled, completion: Completion, place: tuple[int, int, int]) -> TrainedRow:
    update, rollout, mini_batch = place
    return TrainedRow(
        update=update,
        rollout=rollout,
        mini_batch=mini_batch,
        epoch=0,
        ticket=item.ticket.number,
        attempt=item.ticket.attempt,
        sample_index=completion.sample_index,
        is_greedy=completion.is_greedy,
        score=0.0,
        staleness=update - completion.first_policy_version,
    )


def _reference_logprobs(sampled: Sequence[Sampled]) -> list[tuple[float, ...] | None]:
    return [
        logprobs
        for item in sampled
        for logprobs in (item.scored and item.scored.reference_logprobs) or (None,) * len(item.group)
    ]


def _require_reference(split: Sequence[Sequence[Member]]) -> None:
    missing = [item.group for members in split for item in members if item.reference_logprobs is None]
    if missing:
        raise RunError(f"ticket {missing[0]}: a completion came without log-probabilities of the reference")


def _scored(item: Sampled) -> ScoredGroup:
    assert item.scored is not None
    return item.scored


def _values(tensor: Tensor | None, row: int, masks: Tensor) -> tuple[float, ...] | None:
    return None if tensor is None else tuple(tensor[row][masks[row]].tolist())
