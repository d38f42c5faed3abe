"""All ranks of a training stage in one hand: rank 0 leads, the others do what it says (follower.py).

A stage is written for one process. What has to happen on every rank goes through `Ranks`: making a model, an update,
forward passes of many batches, saving, whole weights. With `num_ranks: 1` these are plain calls in this process.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor
from torch import distributed as dist
from transformers import PreTrainedModel

from stages.common.metrics import Mean, merge_means
from stages.learner.config import LearnerConfig
from stages.learner.engine import BatchT, Learner, LossFunction
from stages.learner.group import Group
from stages.learner.processes import Followers
from stages.learner.shares import measure, split_evenly
from stages.learner.wire import Names
from stages.models.sharding import is_shared_out, release_weights

MakeModel = Callable[[], PreTrainedModel]
"""Gives the same model on every rank; it can be pickled."""
ResultT = TypeVar("ResultT")


class Ranks:
    """This process alone."""

    size = 1

    def make_learner(
        self, make_model: MakeModel, config: LearnerConfig, total_updates: int, rescue_dir: Path
    ) -> Learner:
        """A model under training on all ranks; see `Learner`."""
        return Learner(make_model(), config, total_updates, rescue_dir)

    def make_frozen(self, make_model: MakeModel) -> PreTrainedModel:
        """A model that only computes, on this rank's device and on that of every other."""
        return make_model()

    def drop(self, model: PreTrainedModel) -> None:
        """Forget a model of `make_frozen` wherever it is."""
        release_weights(model)

    def map(self, function: Callable[[BatchT], ResultT], batches: Sequence[BatchT]) -> list[ResultT]:
        """One result for each batch, in their order; the batches are spread over all ranks.

        Args:
            function: can be pickled; models that it holds are those of `make_learner` and `make_frozen`.
            batches: micro-batches; a `SequenceBatch` or a record that holds one.
        """
        return [function(batch) for batch in batches]


ALONE = Ranks()
"""For whoever computes in one process."""


class LedRanks(Ranks):
    """Several ranks, of which this process is rank 0."""

    def __init__(self, group: Group, followers: Followers) -> None:
        self.size = group.size
        self._group = group
        self._followers = followers
        self._names = Names()
        self._num_named = 0

    def run(self, function: Callable[..., ResultT], arguments: Sequence[tuple[Any, ...]]) -> list[ResultT]:
        """Call a function on every rank at once; what each gave.

        Args:
            function: can be pickled.
            arguments: of every rank.

        Raises:
            RunError: a rank has ended, or does not answer.
        """
        with self._followers.watched():
            self._send([self._names.pack((function, each)) for each in arguments])
            mine = function(*arguments[0])
            answers: list[Any] = [None] * self.size
            dist.gather_object(b"", answers, dst=0, group=self._group.results)
        return [mine, *(self._names.unpack(answer) for answer in answers[1:])]

    def make_learner(
        self, make_model: MakeModel, config: LearnerConfig, total_updates: int, rescue_dir: Path
    ) -> Learner:
        """A model under training on all ranks."""
        name = self._new_name()
        arguments = (self._names, name, make_model, config, total_updates, rescue_dir)
        self.run(_add_learner, [arguments] * self.size)
        return LedLearner(self, self._names.get(name))

    def make_frozen(self, make_model: MakeModel) -> PreTrainedModel:
        """A model that only computes, on every rank's device."""
        name = self._new_name()
        self.run(_add_frozen, [(self._names, name, make_model)] * self.size)
        model: PreTrainedModel = self._names.get(name)
        return model

    def drop(self, model: PreTrainedModel) -> None:
        """Forget it on every rank."""
        self.run(_drop, [(self._names, self._names.name_of(model))] * self.size)

    def map(self, function: Callable[[BatchT], ResultT], batches: Sequence[BatchT]) -> list[ResultT]:
        """One result for each batch, computed by whichever rank has it in its share."""
        if not batches:
            return []
        shares = split_evenly([measure(batch) for batch in batches], self.size)
        arguments = [(function, [batches[place] for place in share.places]) for share in shares]
        found: dict[int, ResultT] = {}
        for share, results in zip(shares, self.run(_compute_all, arguments), strict=True):
            found |= zip(share.counted, results, strict=False)  # what padding gave comes last
        return [found[place] for place in range(len(batches))]

    def end(self) -> None:
        """Let the followers go."""
        self._send([self._names.pack(None)] * self.size)
        self._followers.wait()

    def _send(self, packed: list[bytes]) -> None:
        dist.scatter_object_list([None], packed, src=0, group=self._group.calls)

    def _new_name(self) -> str:
        self._num_named += 1
        return f"model {self._num_named}"


class LedLearner(Learner):
    """The learners of all ranks as one: rank 0's, with the others doing what it does.

    Args:
        ranks: that have a learner each.
        own: rank 0's, known to the others by name.
    """

    def __init__(self, ranks: LedRanks, own: Learner) -> None:
        self._ranks = ranks
        self._own = own
        self._config = own._config

    @property
    def updates(self) -> int:
        """Updates made so far."""
        return self._own.updates

    @property
    def model(self) -> PreTrainedModel:
        """Rank 0's; where weights are shared out only `Ranks` can compute with it."""
        return self._own.model

    def update(
        self, micro_batches: Sequence[BatchT], loss_function: LossFunction[BatchT], num_padding: int = 0
    ) -> dict[str, Mean]:
        """One update, the micro-batches spread over the ranks; the metrics are those of all of them."""
        assert num_padding == 0
        shares = split_evenly([measure(batch) for batch in micro_batches], self._ranks.size)
        arguments = [
            (self._own, [micro_batches[place] for place in share.places], loss_function, share.num_padding)
            for share in shares
        ]
        parts = self._ranks.run(Learner.update, arguments)
        # Every rank has the same of these.
        same = {name: parts[0][name] for name in ("learner/grad_norm", "learner/lr")}
        metrics = merge_means(parts) | same
        return metrics | {"learner/loss": Mean(metrics["learner/loss"].total, 1)}

    def save(self, directory: Path) -> None:
        """What every rank holds, into one directory."""
        self._ranks.run(Learner.save, [(self._own, directory)] * self._ranks.size)

    def load_as(self, tag: str, directory: Path) -> None:
        """Load it on every rank."""
        self._ranks.run(Learner.load_as, [(self._own, tag, directory)] * self._ranks.size)

    def collect_weights(self) -> dict[str, Tensor]:
        """Every weight of the model, whole."""
        return self._collect(Learner.collect_weights)

    def collect_trained(self) -> dict[str, Tensor]:
        """Those that training changes."""
        return self._collect(Learner.collect_trained)

    def _collect(self, collect: Callable[[Learner], dict[str, Tensor]]) -> dict[str, Tensor]:
        if not is_shared_out(self.model):
            return collect(self._own)
        return self._ranks.run(collect, [(self._own,)] * self._ranks.size)[0]


def _add_learner(
    names: Names, name: str, make_model: MakeModel, config: LearnerConfig, total_updates: int, rescue_dir: Path
) -> None:
    learner = Learner(make_model(), config, total_updates, rescue_dir)
    names.add(name, learner)
    names.add(f"{name}'s weights", learner.model)


def _add_frozen(names: Names, name: str, make_model: MakeModel) -> None:
    names.add(name, make_model())


def _drop(names: Names, name: str) -> None:
    release_weights(names.get(name))
    names.remove(name)


def _compute_all(function: Callable[[BatchT], ResultT], batches: Sequence[BatchT]) -> list[ResultT]:
    return [function(batch) for batch in batches]
