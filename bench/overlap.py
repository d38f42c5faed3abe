"""How well generation and learning overlap: samples per second, and the part of the wall clock that is not waste.

    python bench/overlap.py --rounds 5 --out docs/benchmarks/2026-11-21-overlap.json

Needs the artifacts of a pipeline that has run (data, SFT, reward model). Each arm trains a few updates from the SFT
model with a learning rate near 0, so that every arm does the same work. In the synchronous arm on one core each, the
two sides work in turns: what the learner waits for is generation and scoring alone on their core, and what it works is
learning alone on its own, for the very same work. Hence, per round,

    overlap_efficiency = max(generating alone, learning alone) / wall-clock seconds per update of the arm

The reward model's process runs on whichever core is idle, so in that arm it scores on the learner's core what has been
sampled so far. How much of both cores' time is work at all, by the same arm's seconds:

    core_share = (sampling + scoring + learning alone) / (2 x wall-clock seconds per update of the arm)
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from reports import ROOT, describe_run, hash_files, read_changes, read_report, stage_environment, write_report

SPLIT = {"generator": {"devices": ["0"]}, "learner_devices": "1"}
SHARED = {"generator": {"devices": ["0,1"]}, "learner_devices": "0,1"}
ARMS: dict[str, dict[str, Any]] = {
    "sync, one core each": {"max_staleness": 0, "weight_update": "drain", **SPLIT},
    "sync, both cores in each phase": {"max_staleness": 0, "weight_update": "drain", **SHARED, "score_on": "learner"},
    "async 1, drain": {"max_staleness": 1, "weight_update": "drain", **SPLIT},
    "async 1, in flight": {"max_staleness": 1, "weight_update": "in_flight", **SPLIT},
    "sync in flight, one core each": {"max_staleness": 0, "weight_update": "in_flight", **SPLIT},
}
ALONE = "sync, one core each"
WARM_UP = 3
"""Updates before the measured window: as many versions are new files before one is written over."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="those already in the file of --out are kept")
    parser.add_argument(
        "--updates",
        type=int,
        default=9,
        help=f"of each run; the first {WARM_UP} are not measured; one more is made for each of `max_staleness`",
    )
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--set", nargs="*", default=[], metavar="rl.key=value", help="other settings of every arm")
    parser.add_argument("--inputs", type=Path, default=ROOT / "artifacts", help="holds data, sft and reward")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(run_arm(json.loads(arguments.run), arguments.inputs)))
        return
    if arguments.updates <= WARM_UP:
        parser.error(f"--updates {arguments.updates}: allowed: more than the {WARM_UP} that are not measured")
    changes = read_changes(arguments.set)
    settings = {"settings": changes, "updates": arguments.updates, "arms": arguments.arms, **describe_run()}
    settings["inputs"] = hash_files(*(arguments.inputs / part for part in ("data", "sft", "reward")))
    report = read_report(arguments.out, settings)
    for number in range(len(report["rounds"]), arguments.rounds):
        report["rounds"].append({arm: start(arm, arguments, changes) for arm in arguments.arms})
        report["summary"] = summarise(report["rounds"])
        print(number + 1, json.dumps(report["summary"], indent=1))
        write_report(arguments.out, report)


def start(arm: str, arguments: argparse.Namespace, changes: dict[str, str]) -> dict[str, float]:
    """One run in a process of its own."""
    job = {"arm": ARMS[arm], "changes": changes, "updates": arguments.updates}
    command = [sys.executable, __file__, "--inputs", str(arguments.inputs), "--run", json.dumps(job)]
    done = subprocess.run(
        command, cwd=ROOT, env=stage_environment(), stdout=subprocess.PIPE, text=True, check=True, timeout=1200
    )
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(arm, measured, file=sys.stderr)
    return measured


def run_arm(job: dict[str, Any], inputs: Path) -> dict[str, float]:
    """Train, then read from the timeline what each side did in the measured window."""
    from stages.generation.config import GenerationConfig
    from stages.rl.config import RlConfig
    from stages.rl.train import TIMELINE, PolicyInputs, PolicyOutputs, train_policy

    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    rl, generation = params["rl"], params["generation"]
    rl |= {"num_updates": job["updates"], "eval_every": 1000, "num_eval_prompts": 2, "checkpoint_every": 1000}
    rl["learner"] |= {"lr": 1e-8, "schedule": "constant", "warmup_fraction": 0.0}
    for name, value in job["changes"].items():
        section, *keys, last = name.split(".")
        target = {"rl": rl, "generation": generation}[section]
        for key in keys:
            target = target[key]
        target[last] = yaml.safe_load(value)
    arm = job["arm"]
    rl["generator"] = rl["generator"] | arm["generator"]
    rl |= {key: value for key, value in arm.items() if key != "generator"}
    # Updates after those that are measured: else nothing is sampled for them, and the window's end has less to do.
    rl["num_updates"] += rl["max_staleness"]
    config, generation = RlConfig.model_validate(rl), GenerationConfig.model_validate(generation)
    with tempfile.TemporaryDirectory(prefix="overlap-") as name:
        work = Path(name)
        paths = PolicyInputs(inputs / "data", inputs / "sft", inputs / "reward")
        outputs = PolicyOutputs(work / "policy", work / "policy_last", work / "ledger_out", work / "checkpoints_out")
        result = train_policy(paths, config, generation, work, outputs, log_metrics=lambda *_: None)
        result.timeline.flush()
        measured = measure(work / TIMELINE, config, job["updates"])
    return measured | {"publish_bytes": result.publish_bytes}


def measure(path: Path, config: Any, num_updates: int) -> dict[str, float]:
    """Seconds per update between the ends of the last warm-up update and of the last one that is measured."""
    from stages.rl.timeline import LEARNER, SCORER, Span, read_spans, union_s

    spans = read_spans(path)
    ends = {span.policy_version: span.end_s for span in spans if (span.role, span.kind) == (LEARNER, "learn")}
    begin, end = ends[WARM_UP - 1], ends[num_updates - 1]
    num = num_updates - WARM_UP

    def per_update(*kinds: str, role: str = LEARNER) -> float:
        inside = [
            Span(span.role, span.kind, max(span.start_s, begin), min(span.end_s, end), span.policy_version)
            for span in spans
            if span.role.startswith(role) and span.kind in kinds and span.end_s > begin and span.start_s < end
        ]
        return union_s(inside) / num

    wall_s = (end - begin) / num
    samples = config.prompts_per_update * config.algorithm.samples_per_prompt
    return {
        "wall_s": wall_s,
        "samples_per_s": samples / wall_s,
        "wait_s": per_update("wait"),
        "learner_busy_s": per_update("score", "reference", "learn", "publish", "evaluate", "checkpoint"),
        "publish_s": per_update("publish"),
        "generate_s": per_update("generate", role="generator"),
        "swap_s": per_update("swap", role="generator"),
        "score_s": per_update("score", role=SCORER),
    }


def summarise(rounds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Medians over rounds, and ratios within each round."""
    summary: dict[str, Any] = {}
    for arm in rounds[0]:
        rows = [one[arm] for one in rounds]
        summary[arm] = {name: round(statistics.median(row[name] for row in rows), 3) for name in rows[0]}
        if ALONE in rounds[0]:
            summary[arm] |= compare(rounds, arm)
    return summary


def compare(rounds: list[dict[str, dict[str, float]]], arm: str) -> dict[str, float]:
    def median_of(ratio: Any) -> float:
        return round(statistics.median(ratio(one[ALONE], one[arm]) for one in rounds), 3)

    return {
        "overlap_efficiency": median_of(
            lambda alone, own: max(alone["wait_s"], alone["learner_busy_s"]) / own["wall_s"]
        ),
        "core_share": median_of(
            lambda alone, own: (alone["generate_s"] + alone["score_s"] + alone["learner_busy_s"]) / (2 * own["wall_s"])
        ),
        "balance": median_of(lambda alone, _: alone["wait_s"] / alone["learner_busy_s"]),
        "speed_up": median_of(lambda alone, own: alone["wall_s"] / own["wall_s"]),
        "publish_share": median_of(lambda _, own: own["publish_s"] / own["wall_s"]),
        "swap_share": median_of(lambda _, own: own["swap_s"] / own["wall_s"]),
    }


if __name__ == "__main__":
    main()
