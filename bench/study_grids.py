"""The studies: which cells, on which model, in which order. See study.py.

All cells of a study have the same number of updates and of prompts, and start from the same SFT and reward model. What
they start from is a set-up for two cores, not params.yaml's: MODEL_SMALL is six layers of the default model, taught by
SFT. 144 updates are 9 times the largest staleness, and a multiple of every rollout here (1, 2, 3, 4, 8 and 16).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from cell_queue import Base, Cell

SEEDS = (0, 1, 2)
SHARED: dict[str, Any] = {
    "data.task.num_prompts": 800,
    "data.task.num_demonstrations": 3200,
    "data.num_heldout_prompts": 200,
    "pairs.samples_per_prompt": 4,
    "rl.num_updates": 144,
    "rl.prompts_per_update": 8,
    "rl.max_staleness": 0,
    "rl.eval_every": 16,
    "rl.num_eval_prompts": 48,
    "rl.checkpoint_every": 1000,
    "rl.max_kl_nats": 1000.0,
    "rl.learner.lr": 4e-5,
    "judge.num_shown": 2,
    "tracking.system_metrics": False,
}
"""`max_kl_nats` is out of reach: the judged policy is the best of the evaluations by proxy, whatever its KL."""
MODEL_SMALL = Base(
    "small",
    SHARED
    | {
        "model.keep_layers": 6,
        "sft.learner.trainable_layers": 6,
        "sft.learner.lr": 2e-3,
        "sft.checkpoint_every": 1000,
        "reward.num_epochs": 2,
        "reward.learner.trainable_layers": 6,
        "reward.learner.lr": 6e-4,
        "reward.checkpoint_every": 1000,
        "rl.learner.trainable_layers": 6,
    },
)
MODEL_WHOLE = Base("whole", SHARED)
BASES = {base.name: base for base in (MODEL_SMALL, MODEL_WHOLE)}

ALGORITHMS: dict[str, dict[str, Any]] = {
    "online_dpo": {"samples_per_prompt": 4},
    "ppo": {"samples_per_prompt": 4},
    "rloo": {"samples_per_prompt": 4},
    "best_of_n": {"samples_per_prompt": 4},
    "proximal_rloo": {"samples_per_prompt": 4},
    "remax": {"samples_per_prompt": 3},
    "grpo": {"samples_per_prompt": 4},
}
"""Four completions of each prompt for all; of ReMax's the fourth is the greedy one."""
STALENESS_ALGORITHMS = ("online_dpo", "ppo", "rloo", "best_of_n", "proximal_rloo", "remax")
NUM_REDUCED = 4
"""Of them in the reduced grid."""
ROLLOUTS, ROLLOUTS_REDUCED = (1, 2, 4, 8, 16), (1, 4, 16)
ARMS: dict[str, dict[str, Any]] = {
    "sync, one core each": {"max_staleness": 0, "generator.devices": ["0"], "learner_devices": "'1'"},
    "sync, all cores in each phase": {
        **{"max_staleness": 0, "generator.devices": ["0,1"], "learner_devices": "0,1"},
        "score_on": "learner",
    },
    "async 1": {"max_staleness": 1, "generator.devices": ["0"], "learner_devices": "'1'"},
}


@dataclass(frozen=True)
class Study:
    """A question and its cells, those of most interest first."""

    question: str
    series: str
    """Label whose values are lines of the figure and groups of the table."""
    x: str
    """Label along which a line goes."""
    x_title: str
    cells: list[Cell] = field(default_factory=list)
    figure: Literal["points", "curves"] = "points"
    """points: final gold win-rate by x, and against KL. curves: proxy by samples and by seconds."""


def rollout_settings(num_batches: int, epochs: int = 1) -> dict[str, Any]:
    """N mini-batches sampled by one version, then N·T updates, with nothing running ahead: ages 0 … N·T − 1."""
    return {
        "rl.updates_per_rollout": num_batches,
        "rl.epochs_per_rollout": epochs,
        "rl.max_staleness": num_batches * epochs - 1,
    }


def make_cell(labels: dict[str, Any], settings: dict[str, Any], base: Base = MODEL_SMALL) -> Cell:
    """A cell of labels `algorithm`, `seed` and others; its key is made of all of them."""
    algorithm = {"name": labels["algorithm"], **ALGORITHMS[labels["algorithm"]]}
    if "K" in labels:
        algorithm["samples_per_prompt"] = labels["K"]
    own = {"rl.seed": labels["seed"], "rl.algorithm": algorithm}
    return Cell(", ".join(f"{name} {value}" for name, value in labels.items()), labels, own | settings, base)


def list_staleness() -> Iterator[Cell]:
    """The reduced grid on every seed, then the rest of it."""
    reduced = [(name, n) for n in ROLLOUTS_REDUCED for name in STALENESS_ALGORITHMS[:NUM_REDUCED]]
    whole = [(name, n) for n in ROLLOUTS for name in STALENESS_ALGORITHMS]
    for pairs in (reduced, [pair for pair in whole if pair not in reduced]):
        for seed in SEEDS:
            for name, n in pairs:
                yield make_cell({"algorithm": name, "N": n, "seed": seed}, rollout_settings(n))


def list_sizes() -> Iterator[Cell]:
    """Online DPO by two policies; each has a reward model of its own size."""
    for seed in SEEDS:
        for base in (MODEL_SMALL, MODEL_WHOLE):
            for n in ROLLOUTS_REDUCED:
                labels = {"policy": base.name, "algorithm": "online_dpo", "N": n, "seed": seed}
                yield make_cell(labels, rollout_settings(n), base)


def list_samples() -> Iterator[Cell]:
    """K samples a prompt, T epochs a rollout: online DPO, K at T = 1 and T at K = 4."""
    for seed in SEEDS:
        for k, t in ((2, 1), (4, 1), (8, 1), (4, 2), (4, 3)):
            labels = {"algorithm": "online_dpo", "K": k, "T": t, "seed": seed}
            yield make_cell(labels, rollout_settings(1, t))


def list_asynchronous() -> Iterator[Cell]:
    """Equal updates and samples on the same two cores."""
    for seed in SEEDS:
        for name, arm in ARMS.items():
            settings = {f"rl.{path}": value for path, value in arm.items()}
            yield make_cell({"algorithm": "online_dpo", "arm": name, "seed": seed}, settings)


def list_remax() -> Iterator[Cell]:
    """ReMax and what it is compared with, on the same number of completions, at two sizes."""
    for base in (MODEL_SMALL, MODEL_WHOLE):
        for seed in SEEDS:
            for name in ("remax", "ppo", "rloo", "grpo"):
                yield make_cell({"policy": base.name, "algorithm": name, "seed": seed}, {}, base)


STUDIES = {
    "staleness": Study(
        "How much off-policyness is tolerated, by algorithm? (arXiv:2410.18252, figures 3 and 4)",
        *("algorithm", "N", "N, mini-batches of a rollout (oldest sample: N - 1 updates)"),
        list(list_staleness()),
    ),
    "sizes": Study(
        "Does a larger policy tolerate more off-policyness? (arXiv:2410.18252, figure 5)",
        *("policy", "N", "N, mini-batches of a rollout (oldest sample: N - 1 updates)"),
        list(list_sizes()),
    ),
    "samples": Study(
        "What do more samples a prompt (K) and more epochs (T) give? (arXiv:2410.18252, figures 7 and 8)",
        *("T", "K", "K, samples of each prompt"),
        list(list_samples()),
    ),
    "asynchronous": Study(
        "Is asynchronous online DPO as good as synchronous, and how much faster? (arXiv:2410.18252, figure 1)",
        *("arm", "algorithm", "algorithm"),
        list(list_asynchronous()),
        "curves",
    ),
    "remax": Study(
        "What does ReMax cost and reach beside PPO, RLOO and GRPO? (arXiv:2310.10505)",
        *("algorithm", "policy", "policy"),
        list(list_remax()),
        "curves",
    ),
}
