"""Bytes on disk that a run leaves, and that it needs while it runs. Everything by formula, nothing is compressed."""

from dataclasses import dataclass

from stages.learner.config import LearnerConfig
from stages.plan.architecture import Architecture
from stages.plan.batches import RunPlan
from stages.plan.memory import MOMENTS, count_published
from stages.plan.settings import Settings
from stages.plan.shapes import FLOAT32, SIZES, Trained
from stages.rl.algorithm_config import PpoConfig
from stages.rl.train import make_algorithm

_SAVED = SIZES["bf16"]
"""Models are saved in bf16."""
_SAMPLE_TOKEN_BYTES = 4 + 8 + 4 + 4
"""Of a sampled token in the ledger: its id, log-probability and version, and about four characters of text."""
_LOGPROB_BYTES = 8
_ROW_BYTES = 100
"""A row's other columns."""


@dataclass(frozen=True)
class DiskItem:
    """A file or directory."""

    path: str
    num_bytes: float
    what: str
    is_temporary: bool = False
    """Whether it is there only while its stage runs."""


def list_disk(settings: Settings, policy: Architecture, run: RunPlan) -> list[DiskItem]:
    """What a run writes that is not small. DVC's cache holds the same bytes by hard links, so it counts once."""
    model = _SAVED * policy.num_parameters
    items = [DiskItem(f"artifacts/{name}", model, "model") for name in ("base", "sft")]
    if not settings.has_rule:
        items.append(DiskItem("artifacts/reward", _SAVED * policy.num_reward_parameters, "model"))
    items += [
        DiskItem("artifacts/policy, policy_last", 2 * model, "best and last version; linked if they are the same"),
        *_list_kept(settings, run, model),
        DiskItem("artifacts/ledger", count_ledger(settings, run), "at most, before compression"),
        *_list_published(settings, policy),
        DiskItem(".slipstream/work", _count_checkpoints(settings, policy), "two checkpoints of one stage", True),
    ]
    return items


def count_ledger(settings: Settings, run: RunPlan) -> float:
    """Bytes of the samples and of what was trained on them, if every completion is as long as it may be.

    0 for offline DPO, which samples nothing.
    """
    config, generation = settings.rl, settings.generation
    if config.is_offline:
        return 0
    algorithm = make_algorithm(config, generation)
    is_ppo = isinstance(config.algorithm, PpoConfig)
    num_lists = sum((algorithm.needs_reference, algorithm.needs_proximal, is_ppo))
    sample = 4 * generation.max_prompt_tokens + _SAMPLE_TOKEN_BYTES * generation.max_new_tokens + _ROW_BYTES
    trained = num_lists * _LOGPROB_BYTES * generation.max_new_tokens + _ROW_BYTES
    return float(run.num_completions * sample + run.num_updates * run.update.num_trained * trained)


def _list_kept(settings: Settings, run: RunPlan, model: float) -> list[DiskItem]:
    """Versions beside the best and the last; version 0 is not kept."""
    keep, most = settings.rl.keep_checkpoints, run.num_evaluations - 1
    num = most if keep == "all" else min(keep, most)
    return [DiskItem("artifacts/checkpoints", num * model, f"{num} kept versions")] if num else []


def _list_published(settings: Settings, policy: Architecture) -> list[DiskItem]:
    """Where they have a directory of their own; else they are in shared memory if it has room."""
    config = settings.rl
    if not config.is_live or config.publish != "files" or config.generator.weights_dir is None:
        return []
    return [DiskItem(config.generator.weights_dir, count_published(config, policy), "published weights", True)]


def _count_checkpoints(settings: Settings, policy: Architecture) -> float:
    """The largest stage's: a checkpoint is written beside the last one. RL has its best version there besides."""
    sft, reward, rl = settings.sft.learner, settings.reward.learner, settings.rl.learner
    stages = [count_checkpoint(_describe(policy, sft, "sft"), sft.stage)]
    if not settings.has_rule:
        stages.append(count_checkpoint(_describe(policy, reward, "reward", is_reward=True), reward.stage))
    of_rl = count_checkpoint(_describe(policy, rl, "rl"), rl.stage)
    if isinstance(settings.rl.algorithm, PpoConfig):
        of_rl += count_checkpoint(_describe(policy, rl, "rl", is_reward=True), rl.stage)
    best = _SAVED * policy.num_parameters
    return max(*(2 * num_bytes for num_bytes in stages), 2 * of_rl + best)


def _describe(policy: Architecture, learner: LearnerConfig, section: str, *, is_reward: bool = False) -> Trained:
    return Trained(policy, learner.trainable_layers, f"{section}.learner.trainable_layers", is_reward, learner.lora)


def count_checkpoint(trained: Trained, stage: int) -> float:
    """Bytes of one learner's checkpoint: trained weights and their moments, from ZeRO stage 1 on a second copy too."""
    return float(FLOAT32 * (1 + MOMENTS + (stage > 0)) * trained.num_trained)
