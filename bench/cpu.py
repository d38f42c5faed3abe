"""What do two settings of the C libraries save of an update on CPU cores?

    PYTHONPATH=. python bench/cpu.py --model artifacts/sft --reward artifacts/reward \
        --out docs/benchmarks/2026-11-22-cpu.json

heap: memory that the learner frees is kept for its next update (stages/learner/heap.py), or given back as glibc does by
itself; processor seconds, one thread. waiting: threads that wait for the others of their process let go of their core
soon (ENVIRONMENT_DEFAULTS in stages/common/entry.py), or as late as OpenMP has it; seconds, two threads, alone and
beside a process that keeps a core busy. In each round both arms are measured, in turns, each in a process of its own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from default_run import describe_machine
from memory import ALGORITHMS, ROOT
from reports import git, write_json

from stages.common.entry import ENVIRONMENT_DEFAULTS

SPINS = "GOMP_SPINCOUNT"
SOON, LATE = {SPINS: ENVIRONMENT_DEFAULTS[SPINS]}, {SPINS: "300000"}
"""The latter is what libgomp does without the variable."""
BUSY = """
import os, sys, threading
threading.Thread(target=lambda: os._exit(len(sys.stdin.read()))).start()
while True:
    pass
"""
"""Computes until it is killed, or its standard input is closed by the end of who started it."""


@dataclass(frozen=True)
class Question:
    """Two arms that differ in their environment; the first is this project's."""

    arms: dict[str, dict[str, str]]
    threads: int
    clock: str
    is_beside_work: bool = False


QUESTIONS = {
    # The variable has glibc's own default for its value; that it is there has the learner leave glibc alone.
    "heap": Question({"kept": {}, "given back": {"MALLOC_ARENA_TEST": "8"}}, 1, "cpu_seconds"),
    "waiting, alone": Question({"soon": SOON, "late": LATE}, 2, "seconds"),
    "waiting, beside other work": Question({"soon": SOON, "late": LATE}, 2, "seconds", is_beside_work=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="directory of the SFT model")
    parser.add_argument("--reward", type=Path, required=True, help="directory of the reward model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--questions", nargs="+", default=list(QUESTIONS), choices=QUESTIONS)
    parser.add_argument("--algorithms", nargs="+", default=["rloo"], choices=ALGORITHMS)
    parser.add_argument("--trainable-layers", default="12", metavar="all|N")
    parser.add_argument("--completions", type=int, default=32, help="that an update trains on")
    parser.add_argument("--prompt-tokens", type=int, default=40)
    parser.add_argument("--completion-tokens", type=int, default=48)
    parser.add_argument("--updates", type=int, default=2, help="timed in each process, after one that is not")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    names = ("trainable_layers", "completions", "prompt_tokens", "completion_tokens", "updates")
    constants = {"micro_batch_tokens": 2048, "dtype": "bf16", "warm_up": 1, "what": "seconds"}
    settings = constants | {name: getattr(arguments, name) for name in names}
    report: dict[str, Any] = {"commit": git("rev-parse", "HEAD"), "machine": describe_machine(), "settings": settings}
    report["rows"] = []
    paths = {"model": str(arguments.model.resolve()), "reward": str(arguments.reward.resolve())}
    for name in arguments.questions:
        for algorithm in arguments.algorithms:
            found = answer(QUESTIONS[name], settings | paths | {"algorithm": algorithm}, arguments.rounds)
            report["rows"].append({"question": name, "algorithm": algorithm, **found})
            write_json(arguments.out, report)
    print(format_table(report["rows"]))


def answer(question: Question, arm: dict[str, Any], num_rounds: int) -> dict[str, Any]:
    """Medians of each arm, and what the first saves: median and range of the rounds' shares."""
    labels = list(question.arms)
    rounds = [
        {label: measure(question, label, arm) for label in (labels if number % 2 else reversed(labels))}
        for number in range(num_rounds)
    ]
    ours, theirs = labels
    medians = {
        label: {name: statistics.median(each[label][name] for each in rounds) for name in rounds[0][label]}
        for label in labels
    }
    saved = sorted(1 - each[ours]["update_s"] / each[theirs]["update_s"] for each in rounds)
    return {
        "medians": medians,
        "saved": statistics.median(saved),
        "saved_range": [saved[0], saved[-1]],
        "rounds": rounds,
    }


def measure(question: Question, label: str, arm: dict[str, Any]) -> dict[str, float]:
    """Seconds of an update, without its scores, and what the kernel counted over the whole process."""
    arm = arm | {"threads": question.threads}
    command = [sys.executable, str(ROOT / "bench/memory_arm.py"), json.dumps(arm)]
    unset = {
        name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "GOMP_", "OMP_"))
    }
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(question.threads), **question.arms[label]}
    with (
        busy_core(is_wanted=question.is_beside_work),
        subprocess.Popen(command, cwd=ROOT, env=unset | variables, stdout=subprocess.PIPE, text=True) as process,
    ):
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{arm['algorithm']}: ended with exit code {process.returncode}")
    seconds = json.loads(said.splitlines()[-1])[question.clock]
    return {
        "update_s": sum(spent for phase, spent in seconds.items() if phase != "score"),
        "page_faults": used.ru_minflt,
        "system_s": used.ru_stime,
        "peak_gib": used.ru_maxrss / 2**20,
    }


@contextmanager
def busy_core(*, is_wanted: bool) -> Iterator[None]:
    """A process that always has something to compute, as long as this is open."""
    if not is_wanted:
        yield
        return
    with subprocess.Popen([sys.executable, "-c", BUSY], stdin=subprocess.PIPE) as process:
        try:
            yield
        finally:
            process.kill()


def format_table(rows: list[dict[str, Any]]) -> str:
    """Two lines for each question and algorithm, in Markdown."""
    lines = [
        "| question | algorithm | arm | an update, s | page faults | system, s | peak, GiB | saved |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for label, medians in row["medians"].items():
            low, high = row["saved_range"]
            saved = f"{row['saved']:.0%} [{low:.0%}, {high:.0%}]" if label == next(iter(row["medians"])) else ""
            lines.append(
                f"| {row['question']} | {row['algorithm']} | {label} | {medians['update_s']:.2f} "
                f"| {medians['page_faults']:,.0f} | {medians['system_s']:.1f} | {medians['peak_gib']:.2f} | {saved} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
