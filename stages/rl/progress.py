"""How far a run has come, besides the learner: evaluations, counts, the clock."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from stages.rl.timeline import Timeline, summarise_timeline
from stages.rl.validation import Evaluation


@dataclass
class Progress:
    """What a resume needs besides learner, sampling and timeline."""

    num_samples: int = 0
    first: Evaluation | None = None
    best: Evaluation | None = None
    last: Evaluation | None = None
    staleness: Counter[int] = field(default_factory=Counter)
    """Trained samples by staleness, once for each epoch."""

    @property
    def best_version(self) -> int:
        """Version of the best evaluation; version 0 has KL 0, so there always is one."""
        assert self.best is not None
        return self.best.policy_version

    @property
    def last_version(self) -> int:
        """Version of the last evaluation; -1 before the first."""
        return -1 if self.last is None else self.last.policy_version

    def to_state(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "staleness": dict(self.staleness)}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Progress":
        """From what `to_state` gave."""
        evaluations = {name: Evaluation(**state[name]) if state[name] else None for name in ("first", "best", "last")}
        staleness = Counter({int(value): count for value, count in state["staleness"].items()})
        return cls(**{**state, **evaluations, "staleness": staleness})

    @staticmethod
    def describe_time(timeline: Timeline) -> dict[str, float]:
        """Metrics of the clock: seconds by role and kind so far."""
        elapsed_s = timeline.elapsed_s
        seconds = summarise_timeline(timeline.totals(), elapsed_s)
        return {f"time/{name}": value for name, value in seconds.items()} | {"time/elapsed_s": elapsed_s}
