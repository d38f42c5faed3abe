"""What can be said about settings before a run: what goes wrong, what is a trap, and what could not be looked at."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stages.learner.config import LearnerConfig
from stages.plan.architecture import Architecture
from stages.plan.batches import RunPlan
from stages.plan.settings import Settings
from stages.rl.algorithm_config import BestOfNConfig, DpoConfig

Verdict = Literal["ok", "note", "not checked", "wrong"]


@dataclass(frozen=True)
class Finding:
    """One line of the plan."""

    verdict: Verdict
    text: str


def check_settings(settings: Settings, policy: Architecture, run: RunPlan) -> list[Finding]:
    """What follows from settings and the model's shape."""
    return [
        *check_context(settings, policy),
        *check_sampling(settings),
        *check_batches(settings, run),
        *check_scorers(settings),
        *check_learners(settings),
    ]


def check_learners(settings: Settings) -> Iterator[Finding]:
    """What a learner's settings ask of the machine beside its devices."""
    for name in ("sft", "reward", "rl"):
        learner: LearnerConfig = getattr(settings, name).learner
        moved = [which for which in ("optimizer", "parameters") if getattr(learner, f"offload_{which}") == "cpu"]
        if moved:
            settings_moved = ", ".join(f"offload_{which}" for which in moved)
            yield Finding(
                "not checked", f"{name}.learner: whether main memory holds what {settings_moved} moves there from GPUs"
            )


def check_context(settings: Settings, policy: Architecture) -> Iterator[Finding]:
    """Lengths against the longest sequence the model was made for."""
    lengths = {
        "generation.max_prompt_tokens + max_new_tokens": settings.longest,
        "sft.max_tokens": settings.sft.max_tokens,
    }
    if not settings.has_rule:
        lengths["reward.max_tokens"] = settings.reward.max_tokens
    if policy.context is None:
        yield Finding("not checked", "lengths: the model's config names no longest sequence")
        return
    too_long = {name: value for name, value in lengths.items() if value > policy.context}
    for name, value in too_long.items():
        yield Finding("wrong", f"{name}={value} is above the model's context of {policy.context} tokens; lower it")
    if not too_long:
        longest = max(lengths, key=lambda name: lengths[name])
        yield Finding("ok", f"context: {longest}={lengths[longest]} of {policy.context} tokens")
    if settings.sft.max_tokens < settings.longest:
        yield Finding(
            "note",
            f"sft.max_tokens={settings.sft.max_tokens} is below the {settings.longest} tokens that are sampled: longer "
            f"demonstrations are {'cut' if settings.sft.too_long == 'truncate' else 'dropped'}",
        )


def check_sampling(settings: Settings) -> Iterator[Finding]:
    """Completions must come from the distribution whose log-probabilities are trained."""
    if not settings.rl.is_offline:
        yield Finding(
            "ok", f"sampled and trained distribution are one: temperature {settings.generation.temperature:g}, no top-p"
        )
    if settings.rl.max_staleness and isinstance(settings.rl.algorithm, BestOfNConfig):
        yield Finding("note", "best_of_n imitates samples of older weights as they are: it has no correction")


def check_batches(settings: Settings, run: RunPlan) -> Iterator[Finding]:
    """Micro-batches that are larger than asked for, because what belongs together stays together."""
    longest = settings.reward.max_tokens if settings.rl.is_offline else settings.longest
    wanted = {
        "sft": (settings.sft.learner.micro_batch_tokens, settings.sft.max_tokens),
        "reward": (settings.reward.learner.micro_batch_tokens, 2 * settings.reward.max_tokens),
        "rl": (settings.rl.learner.micro_batch_tokens, run.update.rows_per_unit * longest),
    }
    if settings.has_rule:
        del wanted["reward"]
    for section, (tokens, least) in wanted.items():
        if least > tokens:
            yield Finding(
                "note", f"{section}.learner.micro_batch_tokens={tokens} holds no {least} tokens that stay together"
            )


def check_scorers(settings: Settings) -> Iterator[Finding]:
    """Who labels, who judges."""
    gold = settings.data.task.scorers()[0]
    if settings.pairs.relabel and gold is None:
        yield Finding("wrong", "pairs.relabel=true needs a gold scorer; name one in data.task.gold")
    if gold is None and settings.promotion.win_rate_by == "gold":
        yield Finding("note", "promotion.win_rate_by='gold' without a gold scorer: no policy can pass; set 'proxy'")
    if isinstance(settings.rl.algorithm, DpoConfig) and not settings.has_rule:
        yield Finding("note", "offline DPO trains on the pairs; the reward model is only used by the judge")


def check_source(settings: Settings, inputs: Path) -> Iterator[Finding]:
    """Whether the user's own files are there; a hub data set is not asked for.

    Args:
        settings: all sections.
        inputs: what relative paths are relative to.
    """
    source = getattr(settings.data.task, "source", None)
    if source is not None and source.startswith("hub:"):
        yield Finding("not checked", f"data.task.source: {source} is on the hub")
    elif source is not None and not (inputs / source).is_file():
        yield Finding("not checked", f"data.task.source: {source} is not here yet")
    if settings.gold_model is not None and not (inputs / settings.gold_model).is_dir():
        yield Finding(
            "not checked", f"data.task.gold: {settings.gold_model} is not here yet; its memory is not counted"
        )
    for path in settings.classifiers:
        missing = "" if (inputs / path).is_dir() else "is not here yet; "
        yield Finding("not checked", f"classifier {path}: {missing}its memory is not counted")
