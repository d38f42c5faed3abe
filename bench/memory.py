"""How much memory and time does ReMax save against PPO, RLOO, GRPO and online DPO, with the same model and batch?

    python bench/memory.py --model artifacts/sft --reward artifacts/reward --out docs/benchmarks/2026-11-21-memory.json

An arm is an algorithm in a process of its own, without a generator. It builds models and optimizers as stage
train_policy does, and makes updates on random tokens; all arms train on the same number of completions of the same
lengths. Bytes are those of storages, each counted once, in these components:

- weights of policy, reference, reward model and value model: parameters and buffers;
- moments: the state of AdamW;
- copies: whatever else DeepSpeed's optimizer holds between updates. Under ZeRO 1 and 2 these are the master weights, a
  second float32 copy of all trained weights, which is kept although the weights are float32 themselves;
- gradients: what it and the parameters hold besides, right before the optimizer's step;
- activations: what autograd keeps for the backward pass and is no parameter, at its largest. `cast_weights` is the
  part of it that is shaped like a trained matrix: the compute type's copies of weights.

Not counted is what lives within an operation only: gradients on their way through DeepSpeed's bucket, their flattened
copy, the temporaries of AdamW and of a layer. It shows in `peak`, the process's largest resident memory in a phase of
an update (on CUDA: of allocated memory), less what was resident before there was a model.
"""

import argparse
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from default_run import describe_machine
from reports import ROOT, git, hash_files, stage_environment, write_json

ALGORITHMS = ("ppo", "remax", "rloo", "grpo", "online_dpo")
WARM_UP = 1
"""Updates before the timed ones."""
SETTINGS = ("completions", "prompt_tokens", "completion_tokens", "micro_batch_tokens", "dtype", "threads", "updates")
GIVE_MEMORY_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**18), "MALLOC_TRIM_THRESHOLD_": str(2**18)}
"""Has the C library give freed memory back to the system at once, so that what is resident is in use. Costs time."""
STATE = ("weights", "moments", "copies")
"""Components of a model that live from update to update."""
TRANSIENT = ("gradients", "activations")
"""Those of a trained model that live within its update."""

GIB = 2**30
LLAMA_2_7B = 6_738_415_616
"""Parameters."""
PAPER_TRAINED_GIB, PAPER_FROZEN_GIB = 147.02, 12.55
"""Of one trained model with everything, and of one frozen model: arXiv:2310.10505, appendix E.3."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="directory of the SFT model")
    parser.add_argument("--reward", type=Path, required=True, help="directory of the reward model")
    parser.add_argument("--out", type=Path, help="arms that are in the file are not run again")
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS), choices=ALGORITHMS)
    parser.add_argument("--trainable-layers", nargs="+", default=["all", "12"], metavar="all|N")
    parser.add_argument("--completions", type=int, default=16, help="that an update trains on")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--completion-tokens", type=int, default=48)
    parser.add_argument("--micro-batch-tokens", type=int, default=2048)
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp32"], help="compute type")
    parser.add_argument("--threads", type=int, default=1, help="with 1, CPU seconds are free of other work's share")
    parser.add_argument("--updates", type=int, default=10, help=f"timed, after {WARM_UP} that is not")
    parser.add_argument("--bytes-only", action="store_true", help="leave seconds to a quiet machine and a later call")
    parser.add_argument("--generation-s", type=float, help="in which the samples of an update are generated, if known")
    arguments = parser.parse_args()
    report = read_report(arguments)
    for layers in arguments.trainable_layers:
        arms = report["arms"].setdefault(layers, {})
        for algorithm in arguments.algorithms:
            settings = {"algorithm": algorithm, "trainable_layers": layers}
            if algorithm not in arms:
                arms[algorithm] = start(arguments, settings, "bytes") | note_commit(report)
            if "seconds" not in arms[algorithm] and not arguments.bytes_only:
                arms[algorithm] |= start(arguments, settings, "seconds")
            report |= summarise(report["arms"], arguments.generation_s)
            write_json(arguments.out, report)
    print(json.dumps({key: report[key] for key in ("measured", "computed_7b")}, indent=1))


def read_report(arguments: argparse.Namespace) -> dict[str, Any]:
    """What an earlier call measured, under the same settings."""
    settings = {
        "commit": git("rev-parse", "HEAD"),
        "machine": describe_machine(),
        "versions": {name: version(name) for name in ("torch", "transformers", "deepspeed")},
        "settings": {name: getattr(arguments, name) for name in SETTINGS},
        "inputs": hash_files(arguments.model, arguments.reward),
    }
    if arguments.out is None or not arguments.out.exists():
        return {**settings, "arms": {}}
    report: dict[str, Any] = json.loads(arguments.out.read_text())
    for key, value in settings.items():
        if key != "commit" and report.get(key) != value:
            raise SystemExit(f"{arguments.out}: {key} is {report.get(key)!r}, now {value!r}; name another file")
    return report


def note_commit(report: dict[str, Any]) -> dict[str, str]:
    """Of an arm that is added to a file of another commit."""
    commit = git("rev-parse", "HEAD")
    return {} if commit == report["commit"] else {"commit": commit}


def start(arguments: argparse.Namespace, settings: dict[str, str], what: str) -> dict[str, Any]:
    """One measurement in a process of its own."""
    paths = {"model": str(arguments.model.resolve()), "reward": str(arguments.reward.resolve())}
    arm = settings | paths | {name: getattr(arguments, name) for name in SETTINGS} | {"warm_up": WARM_UP, "what": what}
    command = [sys.executable, str(ROOT / "bench/memory_arm.py"), json.dumps(arm)]
    environment = stage_environment() | {"OMP_NUM_THREADS": str(arguments.threads)}
    environment |= GIVE_MEMORY_BACK if what == "bytes" else {}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(*settings.values(), json.dumps(measured), file=sys.stderr)
    return measured


def summarise(arms: dict[str, dict[str, Any]], generation_s: float | None) -> dict[str, Any]:
    """Totals and what ReMax saves against each of the others, measured; the same sums at the paper's size, computed."""
    measured = {
        layers: {
            "totals": {name: total(arm) for name, arm in found.items()},
            "saved_by_remax": {
                name: compare(arm, found["remax"], generation_s)
                for name, arm in found.items()
                if name != "remax" and "remax" in found
            },
        }
        for layers, found in arms.items()
    }
    return {"measured": measured, "computed_7b": compute_7b(arms.get("all", {}).get("ppo"))}


def total(arm: dict[str, Any]) -> dict[str, float]:
    """Bytes and seconds of all models together."""
    models = arm["bytes"].values()
    state = sum(model.get(name, 0) for model in models for name in STATE)
    transient = [sum(model.get(name, 0) for name in TRANSIENT) for model in models]
    return {
        "state_bytes": state,
        # As the paper counts: gradients and activations of each trained model.
        "sum_bytes": state + sum(transient),
        # As this code trains, one model after the other: of the larger one.
        "one_after_the_other_bytes": state + max(transient),
        "between_updates_bytes": arm["between_updates_bytes"],
        "peak_bytes": max(arm["peak_bytes"].values()),
    } | total_seconds(arm)


def total_seconds(arm: dict[str, Any]) -> dict[str, float]:
    """None where they are not measured yet."""
    if "seconds" not in arm:
        return {}
    seconds, cpu_seconds = sum(arm["seconds"].values()), sum(arm["cpu_seconds"].values())
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "seconds_without_scoring": seconds - arm["seconds"]["score"],
        "cpu_seconds_without_scoring": cpu_seconds - arm["cpu_seconds"]["score"],
    }


def compare(other: dict[str, Any], remax: dict[str, Any], generation_s: float | None) -> dict[str, Any]:
    """Shares saved by ReMax; above 0 it needs less."""
    theirs, own = total(other), total(remax)
    shares = {name: save(theirs[name], own[name]) for name in theirs if name in own}
    if "seconds" not in shares:
        return shares
    clocks = ("seconds", "cpu_seconds")
    # ReMax's update is the faster one where its greedy completions take less than this to generate.
    shares |= {f"break_even_generation_{clock}": round(theirs[clock] - own[clock], 3) for clock in clocks}
    if generation_s is None:
        return shares
    with_generation = {clock: save(generation_s + theirs[clock], 2 * generation_s + own[clock]) for clock in clocks}
    return shares | {f"{clock}_with_generation": share for clock, share in with_generation.items()}


def save(other: float, remax: float) -> float:
    return round(1 - remax / other, 4)


def compute_7b(ppo: dict[str, Any] | None) -> dict[str, float]:
    """What ReMax saves against PPO with two frozen models, by arithmetic; none of it was run.

    `own types` takes the bytes a trained parameter that were measured here, without activations; the others the
    paper's, bf16 weights and gradients, float32 master weights and moments, bf16 frozen models.
    """
    per_parameter = LLAMA_2_7B / GIB
    trained, frozen = 16 * per_parameter, 4 * per_parameter
    activations = PAPER_TRAINED_GIB - trained
    computed = {
        "paper": save(2 * PAPER_TRAINED_GIB + 2 * PAPER_FROZEN_GIB, PAPER_TRAINED_GIB + 2 * PAPER_FROZEN_GIB),
        "paper's activations, GiB": round(activations, 2),
        "without activations": save(2 * trained + frozen, trained + frozen),
        "one model after the other": save(
            28 * per_parameter + frozen + 2 * per_parameter + activations,
            14 * per_parameter + frozen + 2 * per_parameter + activations,
        ),
    }
    if ppo is None:
        return computed
    models = ppo["bytes"]
    policy, num = models["policy"], models["policy"]["trained_parameters"]
    own = sum(policy[name] for name in (*STATE, "gradients")) / num
    own_frozen = sum(models[name]["weights"] / models[name]["parameters"] for name in ("reference", "reward model"))
    return computed | {
        "own types, bytes a trained parameter": round(own, 2),
        "own types, without activations": save(2 * own + own_frozen, own + own_frozen),
    }


if __name__ == "__main__":
    main()
