"""What does a rank hold between updates, by ZeRO stage and with LoRA, and how long does an update take?

    PYTHONPATH=. python bench/ranks.py --model artifacts/base --out docs/benchmarks/2026-11-21-ranks.json

An arm is a number of ranks and settings of the learner, in processes of its own. It makes the learner as stage
train_sft does, makes updates on random tokens, and asks every rank for its resident memory less what it had before
there was a model. Seconds are medians over the timed updates; on a machine with fewer cores than ranks want they say
little about the ranks.
"""

import argparse
import functools
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  what its code takes is no rank's share
import psutil
import torch
from default_run import describe_machine
from reports import ROOT, git, write_json

from stages.common.entry import ENVIRONMENT_DEFAULTS
from stages.data.text import TokenSequence
from stages.learner.config import LearnerConfig
from stages.learner.launch import open_ranks
from stages.learner.ranks import LedRanks, Ranks
from stages.learner.trainable import load_trained_policy
from stages.models.load import list_devices
from stages.sft.train import make_loss_function, split_sequences

WARM_UP = 1
"""Updates before the timed ones; the first makes the optimizer's state."""
ARMS: list[dict[str, Any]] = [
    {"num_ranks": 1, "zero_stage": 2},
    {"num_ranks": 2, "zero_stage": 0},
    {"num_ranks": 2, "zero_stage": 1},
    {"num_ranks": 2, "zero_stage": 2},
    {"num_ranks": 2, "zero_stage": 3},
    {"num_ranks": 2, "zero_stage": 2, "lora": {"rank": 16}},
    {"num_ranks": 2, "zero_stage": 3, "lora": {"rank": 16}},
]
GIVE_MEMORY_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**18), "MALLOC_TRIM_THRESHOLD_": str(2**18)}
"""Has the C library give freed memory back to the system at once, so that what is resident is in use."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sequences", type=int, default=8, help="of an update")
    parser.add_argument("--tokens", type=int, default=64, help="of each")
    parser.add_argument("--updates", type=int, default=3, help="that are timed")
    parser.add_argument("--arms", type=int, default=len(ARMS), help="how many of them")
    parser.add_argument("--arm", help="one of them as JSON, measured in this process")
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(measure_arm(json.loads(options.arm), options)))
        return
    found = [run_arm(arm, options) for arm in ARMS[: options.arms]]
    if options.out:
        settings = {name: getattr(options, name) for name in ("sequences", "tokens", "updates")}
        about = {"commit": git("rev-parse", "HEAD"), "machine": describe_machine(), "settings": settings}
        write_json(options.out, about | {"arms": found})


def run_arm(arm: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--arm", json.dumps(arm), "--model", str(options.model)]
    for name in ("sequences", "tokens", "updates"):
        command += [f"--{name}", str(getattr(options, name))]
    # The other ranks find this file by it, too.
    path = os.pathsep.join([str(ROOT), str(ROOT / "bench")])
    environment = os.environ | ENVIRONMENT_DEFAULTS | GIVE_MEMORY_BACK | {"PYTHONPATH": path}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True, cwd=ROOT)
    measured: dict[str, Any] = {"arm": arm} | json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(measured), flush=True)
    return measured


def measure_arm(arm: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    # As the other ranks know this file: what is defined in `__main__` cannot be sent to them.
    import ranks as this

    config = LearnerConfig.model_validate({"lr": 1e-5, "dtype": "fp32"} | arm)
    rng = random.Random(0)
    examples = [
        TokenSequence((1,), tuple(rng.randrange(3, 250) for _ in range(options.tokens - 1)))
        for _ in range(options.sequences)
    ]
    with tempfile.TemporaryDirectory() as name, open_ranks(config, "sft.learner", Path(name), list_devices()) as team:
        before = ask_all(team, this.read_resident_bytes)
        make_model = functools.partial(load_trained_policy, options.model.resolve(), config, "sft.learner")
        learner = team.make_learner(make_model, config, 1000, Path(name))
        seconds = []
        for _ in range(WARM_UP + options.updates):
            batches = split_sequences(examples, options.tokens * 2, config.num_ranks)
            started = time.monotonic()
            learner.update(batches, make_loss_function(examples))
            seconds.append(time.monotonic() - started)
        after = ask_all(team, this.read_resident_bytes)
        trained = [parameter for parameter in learner.model.parameters() if parameter.requires_grad]
        numbers = {"parameters": count(list(learner.model.parameters())), "trained": count(trained)}
    held = [late - early for early, late in zip(before, after, strict=True)]
    return numbers | {"held_bytes": held, "update_s": statistics.median(seconds[WARM_UP:])}


def ask_all(team: Ranks, function: Any) -> list[int]:
    return team.run(function, [()] * team.size) if isinstance(team, LedRanks) else [function()]


def read_resident_bytes() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def count(parameters: list[torch.nn.Parameter]) -> int:
    return sum(int(getattr(parameter, "ds_numel", parameter.numel())) for parameter in parameters)


if __name__ == "__main__":
    main()
