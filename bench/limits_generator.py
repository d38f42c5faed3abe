"""How near does our generation come to vLLM's own offline engine: tokens per second of the same work on the same core.

    python bench/limits_generator.py --rounds 6 --out FILE.json

Needs the artifacts of a pipeline that has run (data, SFT model). Two processes have the same core in turns, each with
a vLLM engine of the same settings. `offline` calls `vllm.LLM.generate`. `served` is what the RL loop has: `Fleet`,
which sends one HTTP request for each prompt and reads token ids, log-probabilities and versions; no learner works. A
round is the same prompts, seeds and sampling settings in every arm:

- at once: all prompts are asked for, and waited for;
- window: never more than two mini-batches are out, as with `rl.max_staleness: 1`; the oldest has to be complete before
  another is sent. The offline engine, which cannot be given work while it works, gets one mini-batch after the other.

ratio = served / offline in tokens per second, of the same arm within a round. cpu_ratio is the same per second of
processor time that the engine's processes took, which tells more where other programs are on the core.
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import psutil
import yaml
from limits_sides import AT_ONCE, WINDOW, Side, start_offline, start_served
from reports import describe_run, format_rows, hash_files, read_changes, read_report, write_report

from stages.common.entry import ENVIRONMENT_DEFAULTS
from stages.data.store import read_prompts
from stages.generation.config import GenerationConfig
from stages.generation.protocol import Request, SamplingPlan
from stages.generation.requests import make_requests
from stages.models.load import load_tokenizer

ROOT = Path(__file__).parents[1]
ARMS = (AT_ONCE, WINDOW)
TARGET = 0.95


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds",
        type=int,
        default=6,
        help="even, as the sides change places; those already in the file of --out are kept",
    )
    parser.add_argument("--updates", type=int, default=4, help="mini-batches of a round")
    parser.add_argument("--prompts", type=int, help="of a mini-batch; default: rl.prompts_per_update")
    parser.add_argument("--samples", type=int, default=4, help="of each prompt")
    parser.add_argument("--with-greedy", action="store_true", help="and a greedy completion of each, as ReMax asks")
    parser.add_argument("--core", default="0", help="of the engine, in turns")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="other settings of `generation`")
    parser.add_argument("--inputs", type=Path, default=ROOT / "artifacts", help="holds data and sft")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", action="store_true", help="print the table of the file of --out, and run nothing")
    arguments = parser.parse_args()
    if arguments.table:
        print(format_table(read_report(arguments.out, {})))
        return
    os.environ.update({name: value for name, value in ENVIRONMENT_DEFAULTS.items() if name not in os.environ})
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    changes = {name: yaml.safe_load(value) for name, value in read_changes(arguments.set).items()}
    config = GenerationConfig.model_validate(params["generation"] | {"cpu_cores": arguments.core} | changes)
    prompts = arguments.prompts or params["rl"]["prompts_per_update"]
    names = ("updates", "samples", "with_greedy", "core")
    settings = {name: getattr(arguments, name) for name in names} | {"prompts": prompts, "changes": changes}
    settings["inputs"] = hash_files(arguments.inputs / "data", arguments.inputs / "sft")
    report = read_report(arguments.out, {"settings": settings, **describe_run()})
    if len(report["rounds"]) < arguments.rounds:
        measure(arguments, config, prompts, report)
    print(format_table(report))


def measure(arguments: argparse.Namespace, config: GenerationConfig, prompts: int, report: dict[str, Any]) -> None:
    """Add rounds; the sides change places in every other one."""
    sft = arguments.inputs / "sft"
    requests, _ = make_requests(read_prompts(arguments.inputs / "data", "train"), load_tokenizer(sft), config, seed=0)
    plan = SamplingPlan(arguments.samples, arguments.with_greedy)
    wanted = [requests[index % len(requests)] for index in range(arguments.updates * prompts)]
    with tempfile.TemporaryDirectory(prefix="limits-") as name, ExitStack() as stack:
        sides: dict[str, Side] = {
            "offline": stack.enter_context(start_offline(sft, config, plan, prompts, Path(name))),
            "served": stack.enter_context(start_served(sft, config, plan, prompts, Path(name))),
        }
        for side in sides.values():
            side.sample(ARMS[0], wanted[: min(len(wanted), 4)], 0)  # warm-up
        for number in range(len(report["rounds"]), arguments.rounds):
            order = list(sides) if number % 2 == 0 else list(reversed(sides))
            measured = {
                arm: {side: sample(sides[side], arm, wanted, 2 * number + place + 1) for side in order}
                for place, arm in enumerate(ARMS)
            }
            report["rounds"].append({arm: summarise(sides_of) for arm, sides_of in measured.items()})
            report["summary"] = summarise_rounds(report["rounds"])
            write_report(arguments.out, report)


def sample(side: Side, arm: str, requests: Sequence[Request], number: int) -> dict[str, Any]:
    """A round of one side, with the processor time of its processes: another program on the core does not count."""
    before = read_cpu_s(side.pid)
    measured = side.sample(arm, requests, number)
    return measured | {"cpu_s": read_cpu_s(side.pid) - before}


def read_cpu_s(pid: int) -> float:
    root = psutil.Process(pid)
    times = [process.cpu_times() for process in (root, *root.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def summarise(measured: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Speeds of one arm, and how much of what was sampled is the same."""
    tokens = {side: sum(len(ids) for group in value["ids"] for ids in group) for side, value in measured.items()}
    speeds = {side: tokens[side] / value["seconds"] for side, value in measured.items()}
    pairs = list(zip(measured["offline"]["ids"], measured["served"]["ids"], strict=True))
    return {
        "tokens": tokens,
        "seconds": {side: value["seconds"] for side, value in measured.items()},
        "cpu_s": {side: value["cpu_s"] for side, value in measured.items()},
        "tokens_per_s": speeds,
        "ratio": speeds["served"] / speeds["offline"],
        "cpu_ratio": (tokens["served"] / measured["served"]["cpu_s"])
        / (tokens["offline"] / measured["offline"]["cpu_s"]),
        "same_groups": sum(one == other for one, other in pairs) / len(pairs),
    }


def summarise_rounds(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians, and the range of the ratio."""
    summary = {}
    for arm in ARMS:
        ratios = [one[arm]["ratio"] for one in rounds]
        speeds = {
            side: statistics.median(one[arm]["tokens_per_s"][side] for one in rounds) for side in ("offline", "served")
        }
        work = statistics.median(one[arm]["cpu_ratio"] for one in rounds)
        same = statistics.median(one[arm]["same_groups"] for one in rounds)
        summary[arm] = speeds | {"ratio": statistics.median(ratios), "range": [min(ratios), max(ratios)]}
        summary[arm] |= {"cpu_ratio": work, "same": same}
    return summary


def format_table(report: dict[str, Any]) -> str:
    """Medians over rounds."""
    head = ("arm", "offline, tokens/s", "served, tokens/s", "ratio (range)", "of processor time", "same completions")
    rows = [
        (
            arm,
            f"{row['offline']:.0f}",
            f"{row['served']:.0f}",
            f"{row['ratio']:.3f} ({row['range'][0]:.3f}–{row['range'][1]:.3f})",
            f"{row['cpu_ratio']:.3f}",
            f"{100 * row['same']:.0f} % of prompts",
        )
        for arm, row in report["summary"].items()
    ]
    return format_rows(head, rows)


if __name__ == "__main__":
    main()
