"""How many completions a second does a whole update take, against TRL's trainers on the same work?

    python bench/trl_throughput.py --trl-python TRL_ENV/bin/python --rounds 5 --out FILE.json
    python bench/trl_throughput.py --table docs/benchmarks/2026-11-24-trl-throughput.json

Needs the artifacts of a pipeline that has run (data, SFT, reward model) and an environment made from
requirements/trl.txt. A round runs every arm once, each in a process of its own on the same cores: a TRL trainer, ours
with the generator it has (`transformers`, in turns) and ours as shipped (vLLM, one step off). Ratios are taken within
a round. An arm that the file of --out holds is not run again.

All arms sample completions of exactly --tokens tokens: they are given a copy of the SFT model whose end-of-sequence
token is another one, which it never samples.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from default_run import describe_machine
from reports import describe_code, hash_files, stage_environment, write_json

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

ALGORITHMS = ("online_dpo", "rloo", "grpo")
SIDES = ("trl", "transformers", "vllm")
"""TRL; ours with the equal generator; ours as shipped."""
TITLES = {"trl": "TRL", "transformers": "ours, `transformers`", "vllm": "ours, vLLM"}
SAMPLES_PER_PROMPT = {"online_dpo": 2, "rloo": 4, "grpo": 4}
"""TRL's online DPO samples two, whatever is set."""
END_TOKEN = "<empty_output>"
"""Stands in for the end-of-sequence token; of the vocabulary, and never sampled."""
SETTINGS = ("completions", "tokens", "updates", "warm_up", "lr", "cores", "trl_micro_batches", "trl_attention")
SMALLEST = {"completions": 4, "tokens": 6, "updates": 3, "warm_up": 1, "layers": ["all"], "sides": ["transformers"]}
PHASES = ("generate_s", "score_s", "reference_s", "learn_s", "publish_s", "wait_s")


def main() -> None:
    # As an exception it ends the arm at hand too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    arguments = parse()
    if arguments.table:
        print(make_tables(json.loads(arguments.table.read_text())["rounds"]))
        return
    report = read_report(arguments)
    with tempfile.TemporaryDirectory(prefix="trl-throughput-") as name:
        shared = prepare(arguments, Path(name))
        for number in range(arguments.rounds):
            if number == len(report["rounds"]):
                report["rounds"].append({})
            for arm in list_arms(arguments):
                if arm not in report["rounds"][number]:
                    report["rounds"][number][arm] = start(arm, arguments, shared, Path(name))
                    write_json(arguments.out, report)
    check_scores(report["rounds"])
    print(make_tables(report["rounds"]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", type=Path, help="of the environment with TRL; without it its arms are skipped")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS), choices=ALGORITHMS)
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--layers", nargs="+", default=["all", "12"], metavar="all|N", help="that are trained")
    parser.add_argument("--completions", type=int, default=64, help="of an update")
    parser.add_argument("--tokens", type=int, default=48, help="of each completion")
    parser.add_argument("--updates", type=int, default=7, help="of a run")
    parser.add_argument("--warm-up", type=int, default=2, help="updates at its start that are not timed")
    parser.add_argument("--lr", type=float, default=1e-6, help="constant; of AdamW without weight decay")
    parser.add_argument("--cores", default="0,1", help="every arm runs on these")
    parser.add_argument("--trl-micro-batches", type=int, default=4, help="of RLOO and GRPO; online DPO has one")
    parser.add_argument("--trl-attention", default="sdpa", choices=["sdpa", "eager"])
    parser.add_argument("--inputs", type=Path, default=ROOT / "artifacts", help="holds data, sft and reward")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, metavar="FILE", help="only print what this file of --out holds")
    parser.add_argument("--smallest", action="store_true", help="shows that it runs; for a model of a few layers")
    arguments = parser.parse_args()
    if arguments.smallest:
        vars(arguments).update(SMALLEST)
        print("skipped: TRL's arms and vLLM's, --smallest", file=sys.stderr)
    elif arguments.trl_python is None and "trl" in arguments.sides and not arguments.table:
        arguments.sides = [side for side in arguments.sides if side != "trl"]
        print("skipped: TRL's arms, no --trl-python", file=sys.stderr)
    require_sizes(arguments)
    return arguments


def require_sizes(arguments: argparse.Namespace) -> None:
    """Refuse sizes under which fewer completions would be trained on than are counted, or none be timed."""
    if not arguments.sides:
        raise SystemExit("--sides trl: needs --trl-python")
    for name in arguments.algorithms:
        if arguments.completions % SAMPLES_PER_PROMPT[name]:
            allowed = f"allowed for {name}: multiples of {SAMPLES_PER_PROMPT[name]}"
            raise SystemExit(f"--completions {arguments.completions}: {allowed}")
    if not 0 < arguments.warm_up < arguments.updates:
        raise SystemExit(f"--warm-up {arguments.warm_up}: allowed: 1 to {arguments.updates - 1}, less than --updates")


def read_report(arguments: argparse.Namespace) -> dict[str, Any]:
    """What an earlier call measured, under the same settings."""
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    report: dict[str, Any] = {
        "commit": describe_code(),
        "machine": describe_machine(),
        "versions": {name: version(name) for name in ("torch", "transformers", "deepspeed")},
        "settings": settings,
        "inputs": hash_files(*(arguments.inputs / part for part in ("data", "sft", "reward"))),
        "rounds": [],
    }
    if arguments.out is None or not arguments.out.exists():
        return report
    found: dict[str, Any] = json.loads(arguments.out.read_text())
    for key in ("commit", "settings", "inputs"):
        if found.get(key) != report[key]:
            raise SystemExit(f"{arguments.out}: {key} is {found.get(key)!r}, now {report[key]!r}; name another file")
    return found


def list_arms(arguments: argparse.Namespace) -> Iterator[str]:
    """Arms of one round; those that are compared stand beside one another."""
    for layers in arguments.layers:
        for algorithm in arguments.algorithms:
            yield from (f"{layers}/{algorithm}/{side}" for side in arguments.sides)


def prepare(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The model that does not end, and the prompts in the order in which our run draws them."""
    from trl_throughput_ours import make_generation

    from stages.data.store import read_prompts
    from stages.generation.requests import make_requests
    from stages.models.load import load_tokenizer
    from stages.rl.prompts import PromptStream

    copy_without_end(arguments.inputs / "sft", work / "model")
    tokenizer = load_tokenizer(work / "model")
    generation = make_generation("transformers", arguments.tokens, 1)
    requests, _ = make_requests(read_prompts(arguments.inputs / "data", "train"), tokenizer, generation, seed=0)
    stream = PromptStream(requests, seed=0)
    drawn = [stream.get(number).prompt_ids for number in range(arguments.completions * arguments.updates)]
    (work / "prompts.json").write_text(json.dumps([{"ids": ids, "text": tokenizer.decode(ids)} for ids in drawn]))
    (work / "to_score.json").write_text(json.dumps([[drawn[place], drawn[place + 1][:40]] for place in range(4)]))
    return {
        "model": str(work / "model"),
        "data": str(arguments.inputs.resolve() / "data"),
        "reward": str(arguments.inputs.resolve() / "reward"),
        "prompts": str(work / "prompts.json"),
        "to_score": str(work / "to_score.json"),
    } | {name: getattr(arguments, name) for name in SETTINGS}


def copy_without_end(sft: Path, target: Path) -> None:
    """The SFT model, of whose completions `END_TOKEN` is the end; as it is if its vocabulary has no such token."""
    from stages.models.load import load_tokenizer

    target.mkdir()
    for path in sft.resolve().iterdir():
        (target / path.name).symlink_to(path)
    token = load_tokenizer(sft).get_vocab().get(END_TOKEN)
    if token is None:
        return
    changes = {
        "config.json": {"eos_token_id": token},
        "generation_config.json": {"eos_token_id": token},
        "tokenizer_config.json": {"eos_token": END_TOKEN},
    }
    for name, change in changes.items():
        contents = json.loads((sft / name).read_text()) | change
        (target / name).unlink()
        (target / name).write_text(json.dumps(contents))


def start(arm: str, arguments: argparse.Namespace, shared: dict[str, Any], work: Path) -> dict[str, Any]:
    """One run in a process of its own, on the cores that every arm has."""
    layers, algorithm, side = arm.split("/")
    job = shared | {"layers": layers, "algorithm": algorithm, "side": side, "samples": SAMPLES_PER_PROMPT[algorithm]}
    python = arguments.trl_python if side == "trl" else Path(sys.executable)
    script = "trl_throughput_theirs.py" if side == "trl" else "trl_throughput_ours.py"
    # Ours has what a stage has. Threads are the cores', for both.
    environment = dict(os.environ) if side == "trl" else stage_environment()
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment.pop("OMP_NUM_THREADS", None)
    if side == "trl":
        environment.pop("PYTHONPATH", None)
    command = ["taskset", "-c", arguments.cores, str(python.absolute()), str(ROOT / "bench" / script), json.dumps(job)]
    log = work / f"{arm.replace('/', '-')}.log"
    with log.open("w") as errors:
        done = subprocess.run(command, cwd=work, env=environment, stdout=subprocess.PIPE, stderr=errors, timeout=3600)
    if done.returncode:
        raise SystemExit(f"{arm} ended with {done.returncode}:\n{log.read_text()[-4000:]}")
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(arm, {name: value for name, value in measured.items() if name != "scores"}, file=sys.stderr)
    if not arguments.smallest and measured["mean_tokens"] < arguments.tokens - 0.1:
        raise SystemExit(f"{arm}: completions have {measured['mean_tokens']} tokens on average, not {arguments.tokens}")
    return measured


def check_scores(rounds: list[dict[str, Any]]) -> None:
    """Both sides' reward models must give fixed sequences the same scores, but for bf16."""
    for arms in rounds:
        scores = [arm["scores"] for arm in arms.values()]
        worst = max(abs(one - other) for row in scores for one, other in zip(scores[0], row, strict=True))
        if worst > 0.3:
            raise SystemExit(f"the arms' reward models differ by {worst:.2f} on the same sequences: {scores}")


def make_tables(rounds: list[dict[str, Any]]) -> str:
    """Samples per second with ratios to TRL's of the same round, then seconds of an update by phase."""
    return "\n\n".join((make_ratio_table(rounds), make_phase_table(rounds)))


def make_ratio_table(rounds: list[dict[str, Any]]) -> str:
    lines = [
        "| layers | algorithm | arm | completions/s, median | over TRL, median [range] | rounds |",
        "|" + "---|" * 6,
    ]
    for arm in rounds[0]:
        layers, algorithm, side = arm.split("/")
        speeds = [arms[arm]["samples_per_s"] for arms in rounds if arm in arms]
        base = f"{layers}/{algorithm}/trl"
        ratios = [
            arms[arm]["samples_per_s"] / arms[base]["samples_per_s"] for arms in rounds if {arm, base} <= set(arms)
        ]
        ratio = "–" if side == "trl" or not ratios else describe(ratios)
        cells = (layers, algorithm, TITLES[side], f"{statistics.median(speeds):.2f}", ratio, str(len(speeds)))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def make_phase_table(rounds: list[dict[str, Any]]) -> str:
    head = ["layers", "algorithm", "arm", "update", *(name.removesuffix("_s") for name in PHASES)]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for arm in rounds[0]:
        layers, algorithm, side = arm.split("/")
        rows = [arms[arm] for arms in rounds if arm in arms]
        seconds = (statistics.median(row[name] for row in rows) for name in ("wall_s", *PHASES))
        lines.append(f"| {' | '.join((layers, algorithm, TITLES[side], *(f'{value:.2f}' for value in seconds)))} |")
    return "\n".join(lines)


def describe(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"


if __name__ == "__main__":
    main()
