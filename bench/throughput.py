"""How much faster does the learner train than a plain transformers step of the same maths on the same core?

    PYTHONPATH=. python bench/throughput.py --model artifacts/sft --out docs/benchmarks/2026-11-21-throughput.json

An update of the same completions, scores and reference log-probabilities, in turns in one process:

- ours: `Preparation.prepare` (micro-batches, tensors) and `Learner.update` (DeepSpeed, clipping, AdamW), as stage
  train_policy calls them;
- plain: transformers' own forward pass in micro-batches of the same number of tokens, with logits of completion tokens
  only (`logits_to_keep`), autograd, `clip_grad_norm_`, PyTorch's fused AdamW. All prompts have the same length and all
  completions, so it has no padding anywhere. It runs with both attention implementations; the faster one counts.

Both have float32 weights, the same autocast, the same trained layers. Before anything is timed, losses and gradient
norms of the first update must agree, or the script fails. Ratios are taken within a round, of wall-clock seconds.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from default_run import describe_machine
from memory_arm import make_completion
from reports import describe_code, hash_files, stage_environment, write_json
from transformers import AutoModelForCausalLM

from stages.generation.protocol import Request, SamplingPlan, Ticket
from stages.learner.config import LearnerConfig
from stages.learner.engine import Learner, compute_type
from stages.learner.trainable import load_trained_policy
from stages.models.load import select_trainable
from stages.models.shared_prompts import can_share_prompts
from stages.rl.algorithm_config import CorrectionConfig, OnlineDpoConfig, RlooConfig
from stages.rl.algorithms import ALGORITHMS
from stages.rl.mini_batch import MiniBatch, Preparation, Sampled
from stages.rl.rollouts import Reference, compute_loss
from stages.rl.scoring import ScoredGroup

ALGORITHM_SETTINGS: dict[str, Any] = {
    "rloo": RlooConfig(name="rloo", kl_coef=0.0, correction=CorrectionConfig(kind="none")),
    "online_dpo": OnlineDpoConfig(name="online_dpo"),
}
NUM_SAMPLES = 4
"""Of each prompt. RLOO trains on all of them, online DPO on two."""
TARGET = 1.3
LR, CLIP, BETA = 1e-7, 1.0, 0.1
NOT_SETTINGS = ("model", "out", "arm", "arms", "table")
TOLERANCE = 0.03
"""Relative, of loss and gradient norm: both arms compute in bf16 and round at different places."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """What is compared; prompts are a setting of the report, every other value is part of the key in it."""

    algorithm: str
    layers: str
    """all, or how many of the top ones are trained."""
    prompt_tokens: int
    completion_tokens: int
    prompts: int
    """Of an update."""

    @property
    def key(self) -> str:
        return f"{self.algorithm}, {self.layers} layers, {self.prompt_tokens} + {self.completion_tokens} tokens"


ARMS = [
    Arm(algorithm, layers, *shape)
    for shape in ((37, 24, 16), (256, 48, 4))
    for algorithm in ALGORITHM_SETTINGS
    for layers in ("12", "all")
]
"""37 + 24 tokens are the means of the default task; 256 + 48 are a document and its summary."""


def main() -> None:
    import deepspeed  # noqa: F401  its import is no update's time

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="arms that are in the file are not run again")
    parser.add_argument("--prompts", type=int, help="of an update, in place of each arm's")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--micro-batch-tokens", type=int, default=2048)
    parser.add_argument("--zero-stage", default="auto", choices=["auto", "0", "1", "2", "3"], help="of ours")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp32"])
    places = range(len(ARMS))
    parser.add_argument("--arms", type=int, nargs="+", default=list(places), choices=places, help="by their place")
    parser.add_argument("--layers", help="in place of 12, for smaller models")
    parser.add_argument("--arm", type=int, help="by its place, measured in this process")
    parser.add_argument("--table", action="store_true", help="only print what the file holds")
    options = parser.parse_args()
    if options.arm is not None:
        print(json.dumps(measure(find_arm(options.arm, options), options)))
        return
    report = read_report(options)
    for place in () if options.table else options.arms:
        key = find_arm(place, options).key
        if key not in report["arms"]:
            # In a process of its own: what another arm has left in memory is no part of it.
            command = [sys.executable, *sys.argv, "--arm", str(place)]
            done = subprocess.run(command, env=stage_environment(), stdout=subprocess.PIPE, text=True, check=True)
            report["arms"][key] = json.loads(done.stdout.splitlines()[-1])  # libraries talk, too
            write_json(options.out, report)
    print(format_table(report["arms"]))


def read_report(options: argparse.Namespace) -> dict[str, Any]:
    """What an earlier call measured; its settings must be the same."""
    found: dict[str, Any] = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    if options.table:
        if not found:
            raise SystemExit(f"--table: {options.out or 'no --out'}: no such file; measure first, without --table")
        return found
    values = {name: value for name, value in vars(options).items() if name not in NOT_SETTINGS}
    about = {
        "target": TARGET,
        "commit": describe_code(),
        "machine": describe_machine(),
        "settings": {name: value.name if isinstance(value, Path) else str(value) for name, value in values.items()},
        "inputs": hash_files(options.model),
    }
    for key, value in about.items():
        if found and found.get(key) != value:
            raise SystemExit(f"{options.out}: {key} is {found.get(key)!r}, now {value!r}; name another file")
    return found or {**about, "arms": {}}


def find_arm(place: int, options: argparse.Namespace) -> Arm:
    """An arm by its place, with what the options say in its stead."""
    arm = ARMS[place]
    layers = options.layers if options.layers and arm.layers != "all" else arm.layers
    return dataclasses.replace(arm, layers=layers, prompts=options.prompts or arm.prompts)


def measure(arm: Arm, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every round by arm, the ratios and their median."""
    torch.set_num_threads(options.threads)
    sampled, scores = draw_batch(arm)
    layers = arm.layers if arm.layers == "all" else int(arm.layers)
    with tempfile.TemporaryDirectory(prefix="throughput-") as folder:
        steps = {
            "ours": make_ours(arm, options, sampled, scores, Path(folder)),
            "plain eager": PlainStep(options, "eager", layers).step(arm, sampled, scores),
            "plain sdpa": PlainStep(options, "sdpa", layers).step(arm, sampled, scores),
        }
        first = {name: step() for name, step in steps.items()}
        require_agreement(arm, first)
        for step in steps.values():
            step()  # the second still touches memory for the first time, which takes as long as a small update
        rounds = [{name: time_step(step) for name, step in steps.items()} for _ in range(options.rounds)]
    ratios = [min(row["plain eager"], row["plain sdpa"]) / row["ours"] for row in rounds]
    return {
        "first": first,
        "seconds": rounds,
        "ratios": ratios,
        "ratio": statistics.median(ratios),
        "completions_per_s": arm.prompts * NUM_SAMPLES / statistics.median(row["ours"] for row in rounds),
    }


def draw_batch(arm: Arm) -> tuple[list[Sampled], list[float]]:
    """Groups of random tokens, with random scores and reference log-probabilities."""
    generator = torch.Generator().manual_seed(0)

    def draw(num: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, 250, (num,), generator=generator).tolist())

    sampled, scores = [], []
    for number in range(arm.prompts):
        request = Request(str(number), draw(arm.prompt_tokens), seed=number)
        ids = [draw(arm.completion_tokens) for _ in range(NUM_SAMPLES)]
        group = tuple(make_completion(request, index, False, tokens, -9.0) for index, tokens in enumerate(ids))
        values = torch.randn(NUM_SAMPLES, generator=generator).tolist()
        reference = tuple(tuple((-8 - torch.rand(len(tokens), generator=generator)).tolist()) for tokens in ids)
        scored = ScoredGroup(scores=tuple(values), reference_logprobs=reference)
        sampled.append(Sampled(Ticket(number, request, SamplingPlan(NUM_SAMPLES, False)), group, scored))
        scores += values
    return sampled, scores


def make_ours(
    arm: Arm, options: argparse.Namespace, sampled: list[Sampled], scores: list[float], folder: Path
) -> Callable[[], tuple[float, float]]:
    """An update by the product's code."""
    config = LearnerConfig(
        lr=LR,
        schedule="constant",
        warmup_fraction=0.0,
        max_grad_norm=CLIP,
        trainable_layers=arm.layers if arm.layers == "all" else int(arm.layers),
        dtype=options.dtype,
        zero_stage="auto" if options.zero_stage == "auto" else int(options.zero_stage),
        micro_batch_tokens=options.micro_batch_tokens,
    )
    learner = Learner(load_trained_policy(options.model, config, "--layers"), config, 10_000, folder)
    algorithm = ALGORITHMS[arm.algorithm](**ALGORITHM_SETTINGS[arm.algorithm].model_dump(exclude={"name"}))
    policy = Reference(learner.model, config.dtype, 1.0)
    preparation = Preparation(
        algorithm=algorithm,
        scorer=None,
        missing_eos_score=-9.0,
        reference=None,
        learner=policy,
        max_tokens=config.micro_batch_tokens,
        share_prompts=can_share_prompts(learner.model),
    )

    def step() -> tuple[float, float]:
        mini_batch = preparation.prepare(sampled, scores, (0, 0, 0))
        assert isinstance(mini_batch, MiniBatch)
        loss = functools.partial(compute_loss, algorithm=algorithm, totals=mini_batch.totals, reference=policy)
        metrics = learner.update(mini_batch.micro_batches, loss)
        return metrics["learner/loss"].value, metrics["learner/grad_norm"].value

    return step


class PlainStep:
    """What someone who knows transformers well would write."""

    def __init__(self, options: argparse.Namespace, attention: str, layers: Any) -> None:
        model = AutoModelForCausalLM.from_pretrained(
            options.model, dtype=torch.float32, attn_implementation=attention, local_files_only=True
        )
        self.model = model.eval()
        select_trainable(self.model, layers, "--layers")
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=LR, weight_decay=0.0, fused=True)
        self.dtype, self.max_tokens = options.dtype, options.micro_batch_tokens

    def step(self, arm: Arm, sampled: list[Sampled], scores: Sequence[float]) -> Callable[[], tuple[float, float]]:
        """An update by the loss of the arm's algorithm."""
        find_rows = {"rloo": self._rloo_loss, "online_dpo": self._pair_loss}[arm.algorithm]

        def step() -> tuple[float, float]:
            total = 0.0
            ids, compute = find_rows(sampled, torch.tensor(scores).view(-1, NUM_SAMPLES))
            num_rows = max(2, self.max_tokens // ids.shape[1] // 2 * 2)
            for start in range(0, len(ids), num_rows):
                rows = slice(start, start + num_rows)
                with compute_type(self.dtype, "cpu"):
                    loss = compute(self._logprobs(ids[rows], arm.completion_tokens), rows)
                loss.backward()
                total += loss.item()
            norm = float(torch.nn.utils.clip_grad_norm_(self.trained, CLIP))
            self.optimizer.step()
            self.optimizer.zero_grad()
            return total, norm

        return step

    def _logprobs(self, ids: torch.Tensor, num: int) -> torch.Tensor:
        logits = self.model(input_ids=ids, logits_to_keep=num + 1, use_cache=False).logits[:, :-1]
        return logits.float().log_softmax(dim=-1).gather(-1, ids[:, -num:, None]).squeeze(-1)  # [B, T]

    def _rloo_loss(self, sampled: list[Sampled], scores: torch.Tensor) -> tuple[torch.Tensor, Callable[..., Any]]:
        ids = torch.tensor([item.prompt_ids + item.token_ids for group in sampled for item in group.group])
        advantages = (scores - (scores.sum(1, keepdim=True) - scores) / (NUM_SAMPLES - 1)).flatten()
        return ids, lambda logprobs, rows: -(advantages[rows] * logprobs.sum(1)).sum() / len(ids)

    def _pair_loss(self, sampled: list[Sampled], scores: torch.Tensor) -> tuple[torch.Tensor, Callable[..., Any]]:
        chosen = torch.stack([scores.argmax(1), scores.argmin(1)], dim=1).tolist()
        places = [(group, index) for group, pair in zip(sampled, chosen, strict=True) for index in pair]
        ids = torch.tensor([group.group[index].prompt_ids + group.group[index].token_ids for group, index in places])
        reference = torch.tensor([group.scored.reference_logprobs[index] for group, index in places])

        def compute(logprobs: torch.Tensor, rows: slice) -> torch.Tensor:
            ratios = (logprobs - reference[rows]).sum(1).view(-1, 2)
            return -torch.nn.functional.logsigmoid(BETA * (ratios[:, 0] - ratios[:, 1])).sum() / len(sampled)

        return ids, compute


def require_agreement(arm: Arm, first: dict[str, tuple[float, float]]) -> None:
    """Refuse to time arms that compute different things."""
    for name, values in first.items():
        for ours, other in zip(first["ours"], values, strict=True):
            if abs(ours - other) > TOLERANCE * max(abs(ours), abs(other)):
                raise SystemExit(f"{arm.key}: (loss, gradient norm) of ours is {first['ours']}, of {name} {values}")


def time_step(step: Callable[[], object]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def format_table(arms: dict[str, dict[str, Any]]) -> str:
    rows = ["| update | ours, s | plain, s | ratio | range |", "|---|---|---|---|---|"]
    for key, arm in arms.items():
        ours = statistics.median(row["ours"] for row in arm["seconds"])
        plain = statistics.median(min(row["plain eager"], row["plain sdpa"]) for row in arm["seconds"])
        low, high = min(arm["ratios"]), max(arm["ratios"])
        rows.append(f"| {key} | {ours:.2f} | {plain:.2f} | **{arm['ratio']:.2f}** | {low:.2f} to {high:.2f} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
