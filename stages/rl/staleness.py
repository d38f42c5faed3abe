"""How stale the learner's data may be: who may be sampled now, who is trained next, who is too old.

A group (all completions of a prompt) sampled by weights of version p and trained by update u (made by weights of
version u) has staleness u − p. With N mini-batches and T epochs a rollout takes U = N·T updates, so its last one
trains data at least U − 1 updates old even when generation and learning take turns:

    | max_staleness | staleness of update j = 0 … U−1 of a rollout | rollout r is sampled by version |
    |---------------|----------------------------------------------|---------------------------------|
    | U − 1         | j: synchronous                               | rU                              |
    | 2U − 1        | U + j: one step off, as in the paper         | (r−1)U, the first two by 0      |
    | k             |                                              | (r+1)U − 1 − k, or newer        |

Paper: Noukhovitch et al. 2024, arXiv:2410.18252, section 3 (N, T and the one-step lag).

Pacing, not discarding, keeps the bound: a prompt is sent off only once the published version allows it to take the
next free place of the run (`oldest_version`), so that trained in its place it cannot be too old. Groups that finish
early may overtake as long as everyone behind still gets a place in time (`choose`); else the learner waits.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StalenessRule:
    """The bound and the shape of a rollout."""

    max_staleness: int
    """k, in updates."""
    updates_per_rollout: int
    """N, mini-batches of a rollout."""
    epochs_per_rollout: int
    """T, times each mini-batch is trained on."""
    prompts_per_update: int
    """Groups of a mini-batch."""

    @property
    def cycle(self) -> int:
        """U = N·T, updates of a rollout."""
        return self.updates_per_rollout * self.epochs_per_rollout

    @property
    def prompts_per_rollout(self) -> int:
        """Groups of a rollout."""
        return self.updates_per_rollout * self.prompts_per_update

    def count_published(self, *, in_flight: bool) -> int:
        """Published versions there may be at once: one being written, the newest, and one that a server still loads.

        A server that drains takes them in turn with the prompts that were sent before them: when it is slower than
        the learner, one waits for each rollout that the samples may be old.
        """
        return 3 if in_flight else max(3, -(-self.max_staleness // self.cycle) + 2)

    def oldest_version(self, place: int) -> int:
        """Oldest version that may sample the group in a place of the run, 0 being the first group trained."""
        rollout = place // self.prompts_per_rollout
        return max(0, (rollout + 1) * self.cycle - 1 - self.max_staleness)

    def first_update(self, place: int) -> int:
        """Update that trains the group in a place of the run for the first time."""
        rollout, mini_batch = divmod(place // self.prompts_per_update, self.updates_per_rollout)
        return rollout * self.cycle + mini_batch

    def last_first_update(self, version: int) -> int:
        """Latest update that may train data of a version for the first time, its later epochs included."""
        return version + self.max_staleness - (self.epochs_per_rollout - 1) * self.updates_per_rollout

    def opens(self, version: int) -> bool:
        """Whether publishing this version lets a further rollout be sampled: one version in U does."""
        return (version - (self.cycle - 1 - self.max_staleness)) % self.cycle == 0

    def is_too_old(self, version: int, update: int) -> bool:
        """Whether data of a version would break the bound if first trained by this update."""
        return update > self.last_first_update(version)


@dataclass
class Outstanding:
    """A prompt that was sent off and is not trained yet."""

    version: int
    """Version published when it was sent off; once it is finished, the version of its first token."""
    is_ready: bool = False


class Admission:
    """Which tickets (numbered prompts) are out, and what the learner may take next.

    Args:
        rule: the bound.
        num_places: groups that the whole run trains on.
        in_order: the learner takes tickets strictly in order, which makes the run repeatable.
    """

    def __init__(self, rule: StalenessRule, num_places: int, *, in_order: bool) -> None:
        self._rule = rule
        self._num_places = num_places
        self._in_order = in_order
        self.num_consumed = 0
        """Groups trained or in training."""
        self.next_ticket = 0
        self.outstanding: dict[int, Outstanding] = {}

    def admit(self, published: int) -> list[int]:
        """Tickets that may be sent off now that `published` is the newest version."""
        admitted: list[int] = []
        while True:
            place = self.num_consumed + len(self.outstanding)
            if place >= self._num_places or self._rule.oldest_version(place) > published:
                return admitted
            admitted.append(self.next_ticket)
            self.outstanding[self.next_ticket] = Outstanding(published)
            self.next_ticket += 1

    def finish(self, ticket: int, version: int) -> None:
        """A ticket's group is complete and scored; `version` sampled its first token."""
        self.outstanding[ticket] = Outstanding(version, is_ready=True)

    def reissue(self, ticket: int, published: int) -> None:
        """A ticket is sent off again, its attempt having failed or grown too old."""
        self.outstanding[ticket] = Outstanding(published)

    def find_too_old(self, update: int) -> list[int]:
        """Finished tickets that this update may no longer train."""
        return [
            ticket
            for ticket, entry in sorted(self.outstanding.items())
            if entry.is_ready and self._rule.is_too_old(entry.version, update)
        ]

    def choose(self) -> list[int] | None:
        """The tickets of the next mini-batch, oldest first, or None where one that runs must be waited for."""
        size = self._rule.prompts_per_update
        if self._in_order:
            first = sorted(self.outstanding)[:size]
            are_ready = len(first) == size and all(self.outstanding[ticket].is_ready for ticket in first)
            return first if are_ready else None
        by_age = sorted(self.outstanding, key=lambda ticket: (self.outstanding[ticket].version, ticket))
        chosen = [ticket for ticket in by_age if self.outstanding[ticket].is_ready][:size]
        left = [entry for ticket, entry in self.outstanding.items() if ticket not in set(chosen)]
        # With the oldest of all chosen, waiting helps nobody: who misses an update then is found by `find_too_old`.
        is_best = chosen == by_age[:size] or self._can_all_be_trained(left)
        return chosen if len(chosen) == size and is_best else None

    def consume(self, tickets: list[int]) -> None:
        """The learner takes these tickets."""
        for ticket in tickets:
            del self.outstanding[ticket]
        self.num_consumed += len(tickets)

    def _can_all_be_trained(self, left: Sequence[Outstanding]) -> bool:
        """Whether those left behind, the oldest version first, each still get a place in time."""
        first_place = self.num_consumed + self._rule.prompts_per_update
        deadlines = sorted(self._rule.last_first_update(entry.version) for entry in left)
        return all(
            self._rule.first_update(first_place + number) <= deadline for number, deadline in enumerate(deadlines)
        )
