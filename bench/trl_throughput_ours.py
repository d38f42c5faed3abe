"""One of our arms for trl_throughput.py, in a process of its own: the RL stage itself for a few updates."""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from stages.data.records import Completion
from stages.generation.config import GenerationConfig
from stages.generation.protocol import Event, Finished, Generator, Ticket, WeightsUpdate
from stages.rl import train
from stages.rl.config import RlConfig
from stages.rl.ledger.reader import read_ledger
from stages.rl.timeline import LEARNER, Span, read_spans, union_s
from stages.scoring.load import load_scorer

PARAMS = Path(__file__).parents[1] / "params.yaml"
ALGORITHMS: dict[str, dict[str, Any]] = {
    "online_dpo": {"name": "online_dpo", "beta": 0.1},
    "rloo": {"name": "proximal_rloo", "kl_coef": 0.05},
    "grpo": {"name": "grpo", "kl_loss_coef": 0.04},
}
"""Those whose losses and gradients are TRL's: see docs/benchmarks/2026-11-21-trl-agreement-rl.md."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", help="as JSON; see trl_throughput.py")
    job = json.loads(parser.parse_args().job)
    scores = score_fixed(job)
    print(json.dumps(run(job) | {"scores": scores, "threads": torch.get_num_threads()}))


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Train, then read from the timeline what each side did in the measured updates."""
    config = make_config(job)
    num_prompts = job["completions"] // job["samples"]
    generation = make_generation(job["side"], job["tokens"], num_prompts if job["side"] == "transformers" else 1)
    train.start_generator = start_finishing_generator  # type: ignore[assignment]
    with tempfile.TemporaryDirectory(prefix="trl-throughput-") as name:
        work = Path(name)
        paths = train.PolicyInputs(Path(job["data"]), Path(job["model"]), Path(job["reward"]))
        outputs = train.PolicyOutputs(work / "policy", work / "last", work / "ledger_out", work / "checkpoints")
        cpu_ends: dict[int, float] = {}

        def note_cpu_time(_: dict[str, float], version: int) -> None:
            cpu_ends[version] = time.process_time()

        train.train_policy(paths, config, generation, work, outputs, note_cpu_time).timeline.flush()
        measured = measure(read_spans(work / train.TIMELINE), job) | measure_tokens(outputs.ledger)
        if job["side"] == "transformers":  # of this process alone, and vLLM's servers are others
            num = job["updates"] - job["warm_up"]
            measured["cpu_s"] = (cpu_ends[job["updates"]] - cpu_ends[job["warm_up"]]) / num
        return measured


def make_config(job: dict[str, Any]) -> RlConfig:
    """Section `rl` as committed but for what both sides share; synchronous with TRL's generator."""
    section = yaml.safe_load(PARAMS.read_text())["rl"]
    section |= {
        "algorithm": ALGORITHMS[job["algorithm"]] | {"samples_per_prompt": job["samples"]},
        "num_updates": job["updates"],
        "prompts_per_update": job["completions"] // job["samples"],
        "eval_every": 1000,
        "num_eval_prompts": 2,
        "checkpoint_every": 1000,
    }
    # Updates after the timed ones: else nothing is sampled for them, and the window's end has the cores for itself.
    section["num_updates"] += section["max_staleness"]
    if job["side"] == "transformers":
        section |= {"num_updates": job["updates"], "max_staleness": 0, "score_on": "learner", "weight_update": "drain"}
    section["learner"] |= {
        "lr": job["lr"],
        "schedule": "constant",
        "warmup_fraction": 0.0,
        "trainable_layers": yaml.safe_load(job["layers"]),
    }
    return RlConfig.model_validate(section)


def make_generation(engine: str, tokens: int, prompts_at_once: int) -> GenerationConfig:
    """Section `generation` as committed, with this engine and length."""
    section = yaml.safe_load(PARAMS.read_text())["generation"]
    changes = {"engine": engine, "max_new_tokens": tokens, "prompts_at_once": prompts_at_once}
    return GenerationConfig.model_validate(section | changes)


@contextmanager
def start_finishing_generator(*arguments: Any, **settings: Any) -> Iterator[Generator]:
    """The stage's own generator, whose completions count as finished.

    All have full length, and would otherwise all get the score of unfinished ones.
    """
    from stages.generation.start import start_generator

    with start_generator(*arguments, **settings) as generator:
        yield Finishing(generator)


class Finishing:
    """A `Generator` around another one."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator

    def submit(self, ticket: Ticket) -> None:
        """See `Generator.submit`."""
        self._generator.submit(ticket)

    def publish(self, update: WeightsUpdate) -> None:
        """See `Generator.publish`."""
        self._generator.publish(update)

    def wait(self, timeout_s: float) -> list[Event]:
        """See `Generator.wait`."""
        return [_finish(event) if isinstance(event, Finished) else event for event in self._generator.wait(timeout_s)]

    def close(self) -> None:
        """See `Generator.close`."""
        self._generator.close()


def _finish(event: Finished) -> Finished:
    return replace(event, group=tuple(replace(item, is_finished=True) for item in event.group))


def measure(spans: list[Span], job: dict[str, Any]) -> dict[str, float]:
    """Seconds per update between the ends of the last warm-up update and of the last one."""
    ends = {span.policy_version: span.end_s for span in spans if (span.role, span.kind) == (LEARNER, "learn")}
    begin, end, num = ends[job["warm_up"] - 1], ends[job["updates"] - 1], job["updates"] - job["warm_up"]

    def per_update(kind: str) -> float:
        inside = [
            replace(span, start_s=max(span.start_s, begin), end_s=min(span.end_s, end))
            for span in spans
            if span.kind == kind and span.end_s > begin and span.start_s < end
        ]
        return union_s(inside) / num

    kinds = ("generate", "swap", "score", "reference", "learn", "publish", "wait")
    seconds = {f"{kind}_s": per_update(kind) for kind in kinds}
    wall_s = (end - begin) / num
    return {"wall_s": wall_s, "samples_per_s": job["completions"] / wall_s} | seconds


def measure_tokens(ledger: Path) -> dict[str, float]:
    """Mean length of the completions that were trained on."""
    reader = read_ledger(ledger)
    lengths = [
        len(item.token_ids)
        for update in reader.updates()
        for group in reader.groups(update.keys).values()
        for item in group
    ]
    return {"mean_tokens": sum(lengths) / len(lengths)}


def score_fixed(job: dict[str, Any]) -> list[float]:
    """Scores of fixed sequences, to be held against TRL's arm."""
    rows = json.loads(Path(job["to_score"]).read_text())
    completions = [
        Completion(
            prompt_id=str(number),
            sample_index=0,
            is_greedy=False,
            prompt_ids=tuple(prompt_ids),
            token_ids=tuple(token_ids),
            sampling_logprobs=(),
            text="",
            is_finished=True,
            first_policy_version=0,
            last_policy_version=0,
        )
        for number, (prompt_ids, token_ids) in enumerate(rows)
    ]
    return load_scorer(Path(job["reward"]), "bf16", 4096).score(completions)


if __name__ == "__main__":
    main()
