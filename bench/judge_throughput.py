"""What of the ideal speed the LLM judge reaches: wall time over calls * latency / concurrency.

    .venv/bin/python bench/judge_throughput.py --matches 1000 --out FILE.json

The endpoint is a server in a process of its own on this machine that answers every call after the same time. Verdicts
are stored and the account is kept as in a real evaluation, on the file system of --workspace.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reports import write_json

from stages.data.records import Message, Prompt
from stages.judge.config import JudgeConfig
from stages.judge.llm.judging import judge_matches
from stages.judge.llm.verdicts import VERDICTS_VARIABLE
from stages.judge.matches import Match

ROOT = Path(__file__).parents[1]
START_S = 60.0
COMPLETION = "It opens slowly, but the second half is worth the wait and the two leads carry it well. " * 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matches", type=int, default=1000, help="each is asked about in both orders")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--latency-s", type=float, default=0.2, help="of every call")
    parser.add_argument("--workspace", type=Path, help="where verdicts and accounts go; removed afterwards")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    arms = [
        measure(arguments.matches, concurrency, arguments.latency_s, arguments.workspace)
        for concurrency in arguments.concurrency
    ]
    report = {**describe_run(), "load_before": load, "latency_s": arguments.latency_s, "arms": arms}
    print(json.dumps(report, indent=1))
    write_json(arguments.out, report)


def measure(num_matches: int, concurrency: int, latency_s: float, workspace: Path | None) -> dict[str, Any]:
    """Judge all matches with an empty store and with a full one."""
    matches = [make_match(number) for number in range(num_matches)]
    with tempfile.TemporaryDirectory(dir=workspace) as name, serve(Path(name) / "address", latency_s) as url:
        os.environ[VERDICTS_VARIABLE] = str(Path(name) / "verdicts")
        config = JudgeConfig(model="fake", base_url=url, concurrency=concurrency)
        started, started_cpu = time.monotonic(), time.process_time()
        judging = judge_matches(matches, config, Path(name) / "work")
        wall_s, cpu_s = time.monotonic() - started, time.process_time() - started_cpu
        started = time.monotonic()
        again = judge_matches(matches, config, Path(name) / "again")
        again_s = time.monotonic() - started
    ideal_s = judging.num_calls * latency_s / concurrency
    return {
        "concurrency": concurrency,
        "verdicts": judging.num_bought,
        "calls": judging.num_calls,
        "wall_s": wall_s,
        "ideal_s": ideal_s,
        "wall_over_ideal": wall_s / ideal_s,
        "cpu_s": cpu_s,
        "stored_verdicts": again.num_cached,
        "stored_wall_s": again_s,
    }


def make_match(number: int) -> Match:
    prompt = Prompt(f"p{number}", (Message("user", f"The film number {number} was"),), f"g{number}")
    return Match(prompt, 0, f"{COMPLETION} {number}", f"{COMPLETION} not {number}")


@contextmanager
def serve(address: Path, latency_s: float) -> Iterator[str]:
    """The address of an endpoint in a process of its own."""
    command = [sys.executable, "-m", "tests.hostile_judge", str(address), "--latency-s", str(latency_s)]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        limit = time.monotonic() + START_S
        while not address.exists():
            if process.poll() is not None or time.monotonic() > limit:
                raise SystemExit("the endpoint did not start")
            time.sleep(0.05)
        yield address.read_text()
    finally:
        process.kill()
        process.wait()


def describe_run() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {"commit": commit.stdout.strip(), "cpus": os.cpu_count(), "python": platform.python_version()}


if __name__ == "__main__":
    main()
