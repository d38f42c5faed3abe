"""The default pipeline on several seeds, each in a fresh clone; writes metrics, and seconds and memory by stage.

    python bench/default_run.py --seeds 0 1 2 --out FILE.json

Every seed of params.yaml is set to the run's seed, so data, SFT, pairs, reward model, RL and evaluation all differ.
A file that is there is not written over: name another one.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from peak_memory import PeakMemory
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
SECTIONS_WITH_SEED = ("data", "sft", "pairs", "reward", "rl", "judge")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", nargs="*", default=[], metavar="section.key=value", help="other settings to change")
    parser.add_argument("--workspace", type=Path, default=None, help="where the clones go; kept if given")
    arguments = parser.parse_args()
    if arguments.out.exists():
        raise SystemExit(f"--out {arguments.out}: holds the runs of an earlier call; name another file")
    workspace = arguments.workspace or Path(tempfile.mkdtemp(prefix="default-run-"))
    report: dict[str, Any] = {"commit": git("rev-parse", "HEAD"), "machine": describe_machine(), "runs": {}}
    for seed in arguments.seeds:
        clone = workspace / f"seed-{seed}"
        report["runs"][str(seed)] = run_seed(seed, clone, dict(item.split("=", 1) for item in arguments.set))
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")
        print(seed, json.dumps(summary(report["runs"][str(seed)])))


def run_seed(seed: int, clone: Path, settings: dict[str, str]) -> dict[str, Any]:
    """One pipeline in a clone of the committed code; its metrics and seconds."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    edit_params(clone / "params.yaml", seed, settings)
    started = time.monotonic()
    with PeakMemory(totals=True) as memory:
        subprocess.run([sys.executable, "-m", "flows.dvc"], cwd=clone, check=True, env=os.environ | {"PYTHONPATH": "."})
    wall_s = time.monotonic() - started
    metrics = {path.stem: json.loads(path.read_text()) for path in sorted((clone / "metrics").glob("*.json"))}
    timings = json.loads((clone / ".slipstream/timings.json").read_text())
    peaks = {"resident_gib": memory.resident_gib, "total_gib": memory.total_gib}
    return {"wall_s": wall_s, "stage_s": timings, "memory": peaks, "metrics": metrics}


def edit_params(path: Path, seed: int, settings: dict[str, str]) -> None:
    yaml = YAML()
    params = yaml.load(path)
    for section in SECTIONS_WITH_SEED:
        params[section]["seed"] = seed
    for name, value in settings.items():
        *sections, key = name.split(".")
        target = params
        for section in sections:
            target = target[section]
        target[key] = YAML(typ="safe").load(value)
    yaml.dump(params, path)


def summary(run: dict[str, Any]) -> dict[str, Any]:
    judge = run["metrics"]["judge"]
    names = ("gold_win_rate", "gold_win_rate_interval", "kl_nats", "length_ratio", "distinct_2_ratio")
    return {"minutes": run["wall_s"] / 60, "accuracy": run["metrics"]["reward"]["accuracy"]} | {
        name: judge[name] for name in names
    }


def describe_machine() -> dict[str, Any]:
    return {"cores": os.cpu_count(), "python": platform.python_version(), "system": platform.platform()}


def git(*arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


if __name__ == "__main__":
    main()
