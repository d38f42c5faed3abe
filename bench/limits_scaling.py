"""How seconds grow with the work: of an update and of generation, against prompts, completion length and layers.

    python bench/limits_scaling.py --model artifacts/base --rounds 3 --out FILE.json

Models have the shape of --model with other numbers of layers, and random weights: their completions never end early, so
each has exactly the length that is asked for. `learner` makes updates as stage train_sft does, of as many completions
as prompts, on one core and in micro-batches of --micro-batch completions. `generator` samples one greedy completion of
each prompt from the fleet's vLLM server, on one core. One of the three sizes changes at a time, the others keep their
middle value. A figure is the median of a size's runs; `slope` is that of log seconds over log size, by least squares.
The ideal line of 1 is work that costs the same however much of it there is: below 1 there is a fixed cost that more
work shares, above 1 the work itself gets dearer. Each number of layers has a process of its own,
or a server.
"""

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from reports import ROOT, describe_run, format_rows, hash_files, read_report, write_report

PROMPT_TOKENS = 64
SIDES = ("learner", "generator")
Point = dict[str, int]
"""prompts, tokens of a completion, layers."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, default=ROOT / "artifacts/base", help="whose shape and tokenizer are used"
    )
    parser.add_argument("--prompts", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--tokens", type=int, nargs="+", default=[24, 48, 96, 192], help="of each completion")
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 15, 30])
    parser.add_argument("--micro-batch", type=int, default=8, help="completions of one forward-backward")
    parser.add_argument("--rounds", type=int, default=3, help="those already in the file of --out are kept")
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--engine", default="vllm", choices=["vllm", "transformers"], help="of the generator")
    parser.add_argument("--core", default="0", help="that each side has, in turns")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", action="store_true", help="print the table of the file of --out, and run nothing")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(run_points(json.loads(arguments.run))))
        return
    if arguments.table:
        print(format_table(read_report(arguments.out, {})))
        return
    names = ("prompts", "tokens", "layers", "micro_batch", "sides", "engine", "core")
    settings = {name: getattr(arguments, name) for name in names} | {"inputs": hash_files(arguments.model)}
    report = read_report(arguments.out, {"settings": settings, **describe_run()})
    with tempfile.TemporaryDirectory(prefix="limits-") as name:
        models = {layers: make_model(arguments.model, layers, Path(name)) for layers in arguments.layers}
        for _ in range(len(report["rounds"]), arguments.rounds):
            report["rounds"].append([row for side in arguments.sides for row in measure(side, arguments, models)])
            report["summary"] = summarise(report["rounds"], list_points(arguments))
            write_report(arguments.out, report)
    print(format_table(report))


def make_model(like: Path, layers: int, folder: Path) -> str:
    """A random model with the shape of another, but for its layers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from stages.models.load import load_tokenizer, save_model

    config = AutoConfig.from_pretrained(like)
    config.num_hidden_layers = layers
    torch.manual_seed(0)
    path = folder / f"layers-{layers}"
    save_model(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), load_tokenizer(like), path)
    return str(path)


def list_points(arguments: argparse.Namespace) -> dict[str, list[Point]]:
    """The sizes that are measured, by the one that changes."""
    sizes = {name: sorted(getattr(arguments, name)) for name in ("prompts", "tokens", "layers")}
    middle = {name: values[(len(values) - 1) // 2] for name, values in sizes.items()}
    middle["layers"] = sizes["layers"][-1]  # the whole model
    return {name: [middle | {name: value} for value in values] for name, values in sizes.items()}


def measure(side: str, arguments: argparse.Namespace, models: dict[int, str]) -> list[dict[str, Any]]:
    """Every point of one side once; a process for each model, as memory and servers are one model's."""
    points = [point for points in list_points(arguments).values() for point in points]
    rows = []
    for layers, model in models.items():
        own = list({tuple(point.values()): point for point in points if point["layers"] == layers}.values())
        job = {"side": side, "model": model, "points": own, "core": arguments.core}
        job |= {"engine": arguments.engine}
        job |= {"micro_batch": arguments.micro_batch, "max_tokens": max(arguments.tokens)}
        command = [sys.executable, __file__, "--run", json.dumps(job)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        seconds = json.loads(done.stdout.splitlines()[-1])
        rows += [{"side": side, **point, "seconds": value} for point, value in zip(own, seconds, strict=True)]
    return rows


def run_points(job: dict[str, Any]) -> list[float]:
    """Seconds of each point, in this process."""
    from stages.common.entry import ENVIRONMENT_DEFAULTS

    os.environ.update({name: value for name, value in ENVIRONMENT_DEFAULTS.items() if name not in os.environ})
    return time_learner(job) if job["side"] == "learner" else time_generator(job)


def time_learner(job: dict[str, Any]) -> list[float]:
    """One update of each point, after one that is not timed."""
    import torch

    from stages.common.guard import parse_cores
    from stages.data.text import TokenSequence
    from stages.learner.config import LearnerConfig
    from stages.learner.engine import Learner
    from stages.learner.trainable import load_trained_policy
    from stages.sft.train import make_loss_function, split_sequences

    os.sched_setaffinity(0, parse_cores(job["core"]))
    torch.set_num_threads(len(parse_cores(job["core"])))
    config, rng, seconds = LearnerConfig(lr=1e-6, schedule="constant"), random.Random(0), []
    with tempfile.TemporaryDirectory(prefix="limits-") as name:
        learner = Learner(load_trained_policy(Path(job["model"]), config, "sft.learner"), config, 1000, Path(name))
        for point in [job["points"][0], *job["points"]]:
            ids = [rng.randrange(3, 250) for _ in range(PROMPT_TOKENS + point["tokens"])]
            examples = [TokenSequence(tuple(ids[:PROMPT_TOKENS]), tuple(ids[PROMPT_TOKENS:]))] * point["prompts"]
            batches = split_sequences(examples, job["micro_batch"] * len(ids))
            started = time.perf_counter()
            learner.update(batches, make_loss_function(examples))
            seconds.append(time.perf_counter() - started)
    return seconds[1:]


def time_generator(job: dict[str, Any]) -> list[float]:
    """The completions of each point, after some that are not timed."""
    from stages.generation.config import GenerationConfig
    from stages.generation.protocol import Request, SamplingPlan, generate
    from stages.generation.start import GeneratorSettings, start_generator

    config = GenerationConfig(
        engine=job["engine"],
        max_new_tokens=job["max_tokens"],
        max_prompt_tokens=PROMPT_TOKENS,
        max_num_seqs=256,
        cpu_cores=job["core"],
    )
    rng, seconds = random.Random(0), []
    with (
        tempfile.TemporaryDirectory(prefix="limits-") as name,
        start_generator(
            Path(job["model"]), config, log_dir=Path(name), settings=GeneratorSettings(devices=(job["core"],))
        ) as generator,
    ):
        for point in [job["points"][0], *job["points"]]:
            requests = [
                Request(f"p{index}", tuple(rng.randrange(3, 250) for _ in range(PROMPT_TOKENS)), seed=index)
                for index in range(point["prompts"])
            ]
            plan = SamplingPlan(0, with_greedy=True, greedy_max_tokens=point["tokens"])
            started = time.perf_counter()
            groups = generate(generator, requests, plan)
            seconds.append(time.perf_counter() - started)
            if any(len(group[0].token_ids) != point["tokens"] for group in groups):
                raise SystemExit(f"a completion of {job['model']} ended before its {point['tokens']} tokens")
    return seconds[1:]


def summarise(rounds: Sequence[Sequence[dict[str, Any]]], points: dict[str, list[Point]]) -> dict[str, Any]:
    """Median seconds of every point, and slopes."""
    rows = [row for one in rounds for row in one]
    found: dict[str, Any] = {}
    for side in dict.fromkeys(row["side"] for row in rows):
        for name, wanted in points.items():
            if len(wanted) == 1:  # it does not change
                continue
            line = []
            for point in wanted:
                same = [row["seconds"] for row in rows if row["side"] == side and point.items() <= row.items()]
                line.append([point[name], round(statistics.median(same), 4)])
            found[f"{side}, {name}"] = {"line": line, "slope": round(fit_slope(line), 3)}
    return found


def fit_slope(line: Sequence[Sequence[float]]) -> float:
    """Of log seconds over log size."""
    xs, ys = [math.log(size) for size, _ in line], [math.log(seconds) for _, seconds in line]
    return statistics.linear_regression(xs, ys).slope


def format_table(report: dict[str, Any]) -> str:
    """One row for each size of each side."""
    rows = []
    for name, row in report["summary"].items():
        sizes, seconds = " / ".join(str(x) for x, _ in row["line"]), " / ".join(f"{y:.2f}" for _, y in row["line"])
        rows.append((*name.split(", "), sizes, seconds, f"{row['slope']:.2f}"))
    return format_rows(("side", "what grows", "sizes", "seconds", "slope (ideal 1)"), rows)


if __name__ == "__main__":
    main()
