"""How much of an update's processor time is saved by computing frozen lower blocks once for all models?

    PYTHONPATH=. python bench/trunk.py --model artifacts/sft --reward artifacts/reward \
        --out docs/benchmarks/2026-11-22-trunk.json

Each algorithm makes the same update with and without, in turns, in one process and without a generator: learner,
reference and value model as stage train_policy builds them, completions of random tokens. Seconds are the processor's,
of one thread, so other work on the machine changes them little. `prepare` is reference and values, `learn` the update.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from default_run import describe_machine
from memory_arm import PARAMS, Arm, build_training, draw_batch, make_config
from reports import git, write_json

from stages.generation.config import GenerationConfig
from stages.rl.mini_batch import Sampled
from stages.rl.training import Training

ALGORITHMS = ("online_dpo", "rloo", "grpo", "remax", "ppo")
PHASES = ("prepare", "learn")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="directory of the SFT model")
    parser.add_argument("--reward", type=Path, required=True, help="directory of the reward model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS), choices=ALGORITHMS)
    parser.add_argument("--trainable-layers", default="12", metavar="N")
    parser.add_argument("--completions", type=int, default=32, help="of an update, without greedy ones")
    parser.add_argument("--prompt-tokens", type=int, default=40)
    parser.add_argument("--completion-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5, help="after one that is not counted")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = {name: value for name, value in vars(arguments).items() if not isinstance(value, Path)}
    report: dict[str, Any] = {"commit": git("rev-parse", "HEAD"), "machine": describe_machine(), "settings": settings}
    report["algorithms"] = {}
    for name in arguments.algorithms:
        report["algorithms"][name] = summarise(measure(name, arguments))
        print(name, json.dumps(report["algorithms"][name]["medians"]), flush=True)
        write_json(arguments.out, report)
    print(format_table(report["algorithms"]))


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Processor seconds of each round, by arm and phase."""
    arm = Arm(
        model=str(arguments.model),
        reward=str(arguments.reward),
        algorithm=name,
        trainable_layers=arguments.trainable_layers,
        completions=arguments.completions,
        prompt_tokens=arguments.prompt_tokens,
        completion_tokens=arguments.completion_tokens,
        micro_batch_tokens=2048,
        dtype="bf16",
        threads=1,
        updates=arguments.rounds,
        warm_up=1,
        what="seconds",
    )
    generation = GenerationConfig.model_validate(yaml.safe_load(PARAMS.read_text())["generation"])
    with tempfile.TemporaryDirectory(prefix="trunk-") as folder:
        training = build_training(make_config(arm), generation, Path(arm.model), Path(arm.reward), Path(folder))
        num_samples = training.preparation.algorithm.num_samples
        sampled = draw_batch(training, arm.completions // num_samples, arm.prompt_tokens, arm.completion_tokens)
        arms = {"with": training, "without": without_trunk(training)}
        rounds = [
            {label: time_update(each, sampled) for label, each in arms.items()}
            for _ in range(arm.warm_up + arm.updates)
        ]
        depth = training.preparation.learner.trunk_depth
    return {"blocks": depth, "rounds": rounds[arm.warm_up :]}


def without_trunk(training: Training) -> Training:
    """The same models, each of which computes all of its blocks."""
    preparation = training.preparation
    reference = preparation.reference and replace(preparation.reference, trunk_depth=0)
    plain = replace(preparation, reference=reference, learner=replace(preparation.learner, trunk_depth=0))
    return replace(training, preparation=plain)


def time_update(training: Training, sampled: list[Sampled]) -> dict[str, float]:
    """Processor seconds of an update, by phase; scores are made up, and differ within each prompt."""
    scores = [float(7 * number % 5) for number in range(sum(len(item.group) for item in sampled))]
    start = time.process_time()
    mini_batch = training.preparation.prepare(sampled, scores, (0, 0, 0))
    prepared = time.process_time()
    assert mini_batch is not None
    training.train(mini_batch, [0] * len(scores))
    return {"prepare": prepared - start, "learn": time.process_time() - prepared}


def summarise(measured: dict[str, Any]) -> dict[str, Any]:
    """Medians over rounds, and what is saved: median and range of the rounds' shares."""
    medians = {
        label: {phase: statistics.median(each[label][phase] for each in measured["rounds"]) for phase in PHASES}
        for label in ("with", "without")
    }
    saved = sorted(1 - sum(each["with"].values()) / sum(each["without"].values()) for each in measured["rounds"])
    return measured | {"medians": medians, "saved": statistics.median(saved), "saved_range": [saved[0], saved[-1]]}


def format_table(algorithms: dict[str, dict[str, Any]]) -> str:
    """A row for each algorithm, in Markdown."""
    rows = [
        "| algorithm | prepare, s | learn, s | without: prepare, s | learn, s | saved |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in algorithms.items():
        seconds = [f"{found['medians'][label][phase]:.2f}" for label in ("with", "without") for phase in PHASES]
        low, high = found["saved_range"]
        rows.append(f"| {name} | {' | '.join(seconds)} | {found['saved']:.0%} [{low:.0%}, {high:.0%}] |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
