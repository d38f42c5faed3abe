"""How far is `make plan`'s estimate of the learner's memory from its measured peak?

    PYTHONPATH=. python bench/preflight.py --configurations bench/preflight_first.json --out FILE.json

A configuration is the shape of a model with random weights and changes to params.yaml. Its learner is made by stage
train_policy's own code, with every model in its process, and makes updates on random tokens of the greatest length that
the settings allow. Measured is each rank's largest resident memory in the updates (on CUDA: allocated memory) less what
it had before there was a model. Estimated is what `make plan` shows for the same settings, without the share it adds
for the process itself. A configuration that the file has is not measured again; a file of another estimator or machine
is refused.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  what its code takes is no rank's share
import peft  # noqa: F401  nor that
import torch
from default_run import describe_machine
from memory import GIVE_MEMORY_BACK, ROOT
from memory_arm import build_training, draw_batch
from memory_counts import ProcessMemory
from reports import git, write_json
from ruamel.yaml import YAML
from transformers import AutoConfig, AutoModelForCausalLM

from stages.common.config import read_params
from stages.common.entry import ENVIRONMENT_DEFAULTS
from stages.learner.launch import open_ranks
from stages.learner.ranks import LedRanks, Ranks
from stages.models.load import list_devices
from stages.models.reward_model import RANGE, init_reward_model
from stages.plan.architecture import read_architecture
from stages.plan.batches import plan_run
from stages.plan.devices import find_devices
from stages.plan.processes import PROCESS_BYTES, Models, Process, list_processes
from stages.plan.settings import Settings, read_settings
from stages.rl.mini_batch import Sampled
from stages.rl.training import Training

UPDATES = 2
"""The first one makes the optimizer's state."""
HERE: dict[str, Any] = {"rl.score_on": "learner", "rl.reference_on": "learner", "rl.max_staleness": 0}
"""Changes that every configuration has: all models in the learner's process."""
ROOM: dict[str, Any] = {
    **{"sft.max_tokens": 1024, "reward.max_tokens": 1024},
    **{"sft.learner.trainable_layers": "all", "reward.learner.trainable_layers": "all"},
}
"""Of stages that are not measured: sampled lengths may not be above theirs, nor layers more than the model has."""
LEARNER = {"rl.learner.lr": 1e-8, "rl.learner.schedule": "constant", "rl.learner.warmup_fraction": 0.0}
TARGET = 0.15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configurations", type=Path, help="JSON: a list of {name, model, changes}")
    parser.add_argument("--out", type=Path, help="configurations that are in the file are not measured again")
    parser.add_argument("--only", nargs="+", help="names of those to measure")
    parser.add_argument("--configuration", help="one of them as JSON, measured in this process")
    options = parser.parse_args()
    if options.configuration:
        print(json.dumps(measure_configuration(json.loads(options.configuration))))
        return
    if options.configurations is None:
        parser.error("name a file with --configurations")
    configurations = json.loads(options.configurations.read_text())
    unknown = sorted(set(options.only or ()) - {item["name"] for item in configurations})
    if unknown:
        raise SystemExit(f"--only {unknown[0]!r}: allowed: {', '.join(item['name'] for item in configurations)}")
    report = read_report(options.out)
    for item in configurations:
        name = item["name"]
        if item != {key: report["configurations"].get(name, item).get(key) for key in item}:
            raise SystemExit(f"{options.out}: {name!r} was another configuration; name another file with --out")
        if name not in report["configurations"] and (not options.only or name in options.only):
            report["configurations"][name] = item | start(item)
            write_json(options.out, report)
    print("\n".join(show_table(report["configurations"])))


def read_report(path: Path | None) -> dict[str, Any]:
    """What an earlier call measured with the same estimator."""
    about = {"estimator": git("rev-parse", "HEAD:stages/plan"), "machine": describe_machine()}
    if path is None or not path.exists():
        return about | {"commit": git("rev-parse", "HEAD"), "configurations": {}}
    report: dict[str, Any] = json.loads(path.read_text())
    for key, value in about.items():
        if report[key] != value:
            raise SystemExit(f"{path}: {key} is {report[key]!r}, now {value!r}; name another file with --out")
    return report


def start(item: dict[str, Any]) -> dict[str, Any]:
    """One configuration in a process of its own."""
    command = [sys.executable, __file__, "--configuration", json.dumps(item)]
    # The other ranks find this file by it, too.
    path = os.pathsep.join([str(ROOT), str(ROOT / "bench")])
    environment = os.environ | ENVIRONMENT_DEFAULTS | GIVE_MEMORY_BACK | {"PYTHONPATH": path}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(item["name"], json.dumps(measured), file=sys.stderr)
    return measured


def measure_configuration(item: dict[str, Any]) -> dict[str, Any]:
    """The estimate of a configuration, and what its ranks held at most."""
    with tempfile.TemporaryDirectory(prefix="preflight-") as name:
        workdir = Path(name)
        settings = write_settings(workdir, item["changes"])
        make_models(workdir, item["model"])
        estimated = estimate(settings, workdir / "sft")
        with open_ranks(settings.rl.learner, "rl.learner", workdir, list_devices()) as ranks:
            measured = measure_peaks(settings, workdir, ranks)
    return estimated | measured


def write_settings(folder: Path, changes: dict[str, Any]) -> Settings:
    """params.yaml with changes, read as `make plan` reads it."""
    params = read_params()
    for name, value in (HERE | ROOM | LEARNER | changes).items():
        *sections, key = name.split(".")
        target = params
        for section in sections:
            target = target[section]
        target[key] = value
    with (folder / "params.yaml").open("w") as file:
        YAML().dump(params, file)
    return read_settings(folder / "params.yaml")


def make_models(folder: Path, shape: dict[str, Any]) -> None:
    """An SFT model and a reward model of one shape, with random weights."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**shape)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "sft")
    reward = init_reward_model(folder / "sft", torch.bfloat16, seed=1)
    setattr(reward.config, RANGE, [-1.0, 1.0])
    reward.save_pretrained(folder / "reward")


def estimate(settings: Settings, model: Path) -> dict[str, Any]:
    """What `make plan` shows for the learner of train_policy; of every rank, if they differ."""
    architecture = read_architecture(model)
    assert architecture is not None
    run = plan_run(settings.rl, settings.generation)
    processes = list_processes(settings, Models(architecture, None), run.update, find_devices())
    learners = find_learners(processes)
    return {
        "parameters": architecture.num_parameters,
        "estimated_bytes": [round(item.needs - PROCESS_BYTES) for item in learners],
        "estimated_parts": [{name: round(size) for name, size in vars(item.parts).items()} for item in learners],
    }


def find_learners(processes: Sequence[Process]) -> list[Process]:
    """The ranks of train_policy's learner, rank 0 first."""
    others = ("generator", "scoring")
    return [item for item in processes if item.stage == "train_policy" and not item.name.startswith(others)]


def measure_peaks(settings: Settings, workdir: Path, ranks: Ranks) -> dict[str, Any]:
    # As the other ranks know this file: what is defined in `__main__` cannot be sent to them.
    import preflight as this

    before = ask_all(ranks, this.read_current)
    training = build_training(settings.rl, settings.generation, workdir / "sft", workdir / "reward", workdir, ranks)
    generation = settings.generation
    sampled = draw_batch(
        training, settings.rl.prompts_per_update, generation.max_prompt_tokens, generation.max_new_tokens
    )
    loading = ask_all(ranks, this.read_peak)
    for _ in range(UPDATES):
        ask_all(ranks, this.reset_peak)
        update(training, sampled)
    peaks, after = ask_all(ranks, this.read_peak), ask_all(ranks, this.read_current)
    return {
        "before_bytes": before,
        "loading_bytes": subtract(loading, before),
        "peak_bytes": subtract(peaks, before),
        "held_bytes": subtract(after, before),
    }


def update(training: Training, sampled: list[Sampled]) -> None:
    """Score, prepare and train, as the loop does."""
    scores = training.preparation.score(sampled)
    mini_batch = training.preparation.prepare(sampled, scores, (0, 0, 0))
    assert mini_batch is not None
    training.train(mini_batch, [0] * len(scores))


def ask_all(ranks: Ranks, function: Any) -> list[int]:
    return ranks.run(function, [()] * ranks.size) if isinstance(ranks, LedRanks) else [function()]


def read_current() -> int:
    return ProcessMemory().read_current()


def read_peak() -> int:
    return ProcessMemory().read_peak()


def reset_peak() -> int:
    ProcessMemory().reset_peak()
    return 0


def subtract(numbers: list[int], others: list[int]) -> list[int]:
    return [number - other for number, other in zip(numbers, others, strict=True)]


def show_table(measured: dict[str, Any]) -> list[str]:
    """Markdown; GB = 10⁹ bytes, the fullest rank."""
    rows = ["| configuration | M parameters | estimated, GB | measured, GB | off by |", "|---|---|---|---|---|"]
    for name, item in measured.items():
        estimated, peak = max(item["estimated_bytes"]), max(item["peak_bytes"])
        off = estimated / peak - 1
        verdict = "" if abs(off) <= TARGET else " (outside)"
        sizes = f"{item['parameters'] / 1e6:.0f} | {estimated / 1e9:.2f} | {peak / 1e9:.2f}"
        rows.append(f"| {name} | {sizes} | {100 * off:+.1f} %{verdict} |")
    return rows


if __name__ == "__main__":
    main()
