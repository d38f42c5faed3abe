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
from reports import ROOT, git, read_changes, write_json
from ruamel.yaml import YAML

SECTIONS_WITH_SEED = ("data", "sft", "pairs", "reward", "rl", "judge")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", nargs="*", default=[], metavar="section.key=value", help="other settings to change")
    parser.add_argument("--workspace", type=Path, help="where the clones go; by default a new folder, which is named")
    arguments = parser.parse_args()
    if arguments.out.exists():
        raise SystemExit(f"--out {arguments.out}: holds the runs of an earlier call; name another file")
    settings = read_changes(arguments.set)
    workspace = arguments.workspace or Path(tempfile.mkdtemp(prefix="default-run-"))
    print(f"the clones, some GB each: {workspace}", file=sys.stderr)
    report: dict[str, Any] = {"commit": git("rev-parse", "HEAD"), "machine": describe_machine(), "runs": {}}
    for seed in arguments.seeds:
        clone = workspace / f"seed-{seed}"
        report["runs"][str(seed)] = run_seed(seed, clone, settings)
        write_json(arguments.out, report)
        print(seed, json.dumps(summary(report["runs"][str(seed)])))


def run_seed(seed: int, clone: Path, settings: dict[str, str]) -> dict[str, Any]:
    """One pipeline in a clone of the committed code; its metrics and seconds."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    edit_params(clone / "params.yaml", {f"{section}.seed": seed for section in SECTIONS_WITH_SEED} | settings)
    started = time.monotonic()
    with PeakMemory(totals=True) as memory:
        subprocess.run([sys.executable, "-m", "flows.dvc"], cwd=clone, check=True, env=os.environ | {"PYTHONPATH": "."})
    wall_s = time.monotonic() - started
    metrics = {path.stem: json.loads(path.read_text()) for path in sorted((clone / "metrics").glob("*.json"))}
    timings = json.loads((clone / ".slipstream/timings.json").read_text())
    peaks = {"resident_gib": memory.resident_gib, "total_gib": memory.total_gib}
    return {"wall_s": wall_s, "stage_s": timings, "memory": peaks, "metrics": metrics}


def edit_params(path: Path, settings: dict[str, Any]) -> None:
    """Change settings of a params.yaml by their paths; text is read as YAML.

    Raises:
        SystemExit: a section that is not there. What a section may hold, the pipeline says.
    """
    yaml = YAML()
    params = yaml.load(path)
    for name, value in settings.items():
        *sections, key = name.split(".")
        target = params
        for section in sections:
            if section not in target:
                raise SystemExit(f"--set {name}: no section {section}; allowed: {', '.join(map(str, target))}")
            target = target[section]
        target[key] = YAML(typ="safe").load(value) if isinstance(value, str) else value
    yaml.dump(params, path)


def summary(run: dict[str, Any]) -> dict[str, Any]:
    judge = run["metrics"]["judge"]
    names = ("gold_win_rate", "gold_win_rate_interval", "kl_nats", "length_ratio", "distinct_2_ratio")
    return {"minutes": run["wall_s"] / 60, "accuracy": run["metrics"]["reward"]["accuracy"]} | {
        name: judge[name] for name in names
    }


def describe_machine() -> dict[str, Any]:
    return {"cores": os.cpu_count(), "python": platform.python_version(), "system": platform.platform()}


if __name__ == "__main__":
    main()
