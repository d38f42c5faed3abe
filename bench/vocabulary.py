"""Does a learner's peak memory grow with the vocabulary beyond what the embeddings themselves need?

    PYTHONPATH=. python bench/vocabulary.py --out docs/benchmarks/2026-11-21-vocabulary.json

An arm is a loss, a vocabulary, and how many layers are trained (all: the output head too, which is the embeddings
themselves), in a process of its own: the learner of one rank with random weights of SmolLM2-135M's shape, two updates
on the same number of random tokens. The losses are the mean log-probability by stages/learner/logprobs.py (`chunked`),
the same with the exact KL to a frozen reference (`kl`), and the mean log-probability from full logits (`plain`).

`own` bytes are what the weights need, by storage: weights, moments, DeepSpeed's copy, gradients, and one copy in the
compute type of each matrix that the backward pass goes through. `growth` is (peak - the growth of own bytes) / peak of
the smaller vocabulary: 1 is flat. An arm that the file has is not measured again.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  what its code takes is no loss's
import torch
from default_run import describe_machine
from memory import GIVE_MEMORY_BACK, ROOT
from memory_arm import note_gradients
from memory_counts import (
    ProcessMemory,
    SavedTensors,
    find_moments,
    find_storages,
    find_weights,
    list_tensors,
    sum_except,
)
from reports import git, write_json
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from stages.common.entry import ENVIRONMENT_DEFAULTS
from stages.common.metrics import Mean
from stages.data.batches import SequenceBatch, collate
from stages.data.text import TokenSequence
from stages.learner.config import LearnerConfig
from stages.learner.engine import Learner
from stages.learner.frozen import load_frozen_policy
from stages.learner.logprobs import compute_logprobs, compute_logprobs_and_kl
from stages.learner.trainable import load_trained_policy
from stages.plan.architecture import KNOWN

SHAPE: dict[str, Any] = json.loads((KNOWN / "smollm2-135m.json").read_text())["config"]
LOSSES = ("chunked", "kl", "plain")
TARGET = 1.15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--vocabularies", nargs=2, type=int, default=[32_000, 128_000], help="smaller and larger")
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), choices=LOSSES)
    parser.add_argument("--trainable-layers", nargs="+", default=["all", "12"], metavar="all|N")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"], help="of the model")
    parser.add_argument("--rows", type=int, default=16, help="sequences of the batch")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--completion-tokens", type=int, default=48)
    parser.add_argument("--arm", help="one as JSON, measured in this process")
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(measure_arm(json.loads(options.arm))))
        return
    report = read_report(options)
    for layers in options.trainable_layers:
        for loss in options.losses:
            for vocabulary in options.vocabularies:
                name = f"{loss}, {layers}, {vocabulary}"
                if name not in report["arms"]:
                    arm = {"loss": loss, "trainable_layers": layers, "vocabulary": vocabulary}
                    report["arms"][name] = arm | start(arm | report["settings"])
                    write_json(options.out, report)
    print("\n".join(show_table(report, options.vocabularies)))


def read_report(options: argparse.Namespace) -> dict[str, Any]:
    """What an earlier call measured with the same code and settings."""
    settings = {name: getattr(options, name) for name in ("layers", "rows", "prompt_tokens", "completion_tokens")}
    about = {"learner": git("rev-parse", "HEAD:stages/learner"), "machine": describe_machine(), "settings": settings}
    if options.out is None or not options.out.exists():
        return about | {"commit": git("rev-parse", "HEAD"), "arms": {}}
    report: dict[str, Any] = json.loads(options.out.read_text())
    for key, value in about.items():
        if report[key] != value:
            raise SystemExit(f"{options.out}: {key} is {report[key]!r}, now {value!r}; name another file with --out")
    return report


def start(arm: dict[str, Any]) -> dict[str, Any]:
    """One arm in a process of its own."""
    command = [sys.executable, __file__, "--arm", json.dumps(arm)]
    environment = os.environ | ENVIRONMENT_DEFAULTS | GIVE_MEMORY_BACK | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(arm), json.dumps(measured), file=sys.stderr)
    return measured


def measure_arm(arm: dict[str, Any]) -> dict[str, Any]:
    memory = ProcessMemory()
    before = memory.read_current()
    with tempfile.TemporaryDirectory(prefix="vocabulary-") as name:
        path = Path(name) / "model"
        learner = make_learner(arm, path)
        reference = load_frozen_policy(path, make_config(arm)) if arm["loss"] == "kl" else None
        batch, loss = draw_batch(arm), make_loss(arm["loss"], reference)
        peaks: dict[str, int] = {}
        watch_step(learner, memory, peaks)
        for _ in range(2):  # the first one makes the optimizer's state
            memory.reset_peak()
            learner.update([batch], loss)
            peaks["step"] = memory.read_peak()
        own = count_own(learner, batch, loss)
    if reference is not None:
        own["reference"] = sum(find_weights(reference).values()) + 2 * arm["vocabulary"] * SHAPE["hidden_size"]
    return {"peak_bytes": {kind: peak - before for kind, peak in peaks.items()}, "own_bytes": own}


def make_learner(arm: dict[str, Any], path: Path) -> Learner:
    """As a stage makes it; its model is saved to `path` first."""
    torch.manual_seed(0)
    shape = SHAPE | {"vocab_size": arm["vocabulary"], "num_hidden_layers": arm["layers"]}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=torch.bfloat16).save_pretrained(path)
    config = make_config(arm)
    return Learner(load_trained_policy(path, config, "learner"), config, 1000, path)


def make_config(arm: dict[str, Any]) -> LearnerConfig:
    layers = arm["trainable_layers"]
    return LearnerConfig(lr=1e-8, trainable_layers=layers if layers == "all" else int(layers))


def draw_batch(arm: dict[str, Any]) -> SequenceBatch:
    generator = torch.Generator().manual_seed(0)

    def draw(num: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, arm["vocabulary"], (num,), generator=generator).tolist())

    return collate(
        [TokenSequence(draw(arm["prompt_tokens"]), draw(arm["completion_tokens"])) for _ in range(arm["rows"])]
    )


def make_loss(kind: str, reference: PreTrainedModel | None) -> Callable[..., tuple[Tensor, dict[str, Mean]]]:
    """Of completion tokens only, in every arm."""

    def compute(model: PreTrainedModel, batch: SequenceBatch) -> tuple[Tensor, dict[str, Mean]]:
        if reference is not None:
            logprobs, kl = compute_logprobs_and_kl(model, reference, batch, 1.0)
            return (kl - logprobs).mean(), {}
        logprobs = compute_logprobs(model, batch) if kind == "chunked" else compute_plain(model, batch)
        return -logprobs.mean(), {}

    return compute


def compute_plain(model: PreTrainedModel, batch: SequenceBatch) -> Tensor:
    """Full logits of every position, as a model gives them. [N]"""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits  # [B, S, V]
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    rows, columns = torch.nonzero(batch.completion_mask, as_tuple=True)
    return logprobs[rows, batch.prompt_lengths[rows] + columns - 1, batch.completion_ids[batch.completion_mask]]


def watch_step(learner: Learner, memory: ProcessMemory, peaks: dict[str, int]) -> None:
    """Note the peak of forward and backward pass before each step."""
    step = learner._engine.step

    def note_and_step() -> None:
        peaks["backward"] = memory.read_peak()
        memory.reset_peak()
        step()

    learner._engine.step = note_and_step


def count_own(learner: Learner, batch: SequenceBatch, loss: Any) -> dict[str, int]:
    """Bytes that the weights need; makes one more update."""
    gradients, saved = note_gradients(learner._engine), SavedTensors(learner.model)
    with saved.hooks():
        learner.update([batch], loss)
    optimizer, head = learner._engine.optimizer, learner.model.get_output_embeddings().weight
    weights, moments = find_weights(learner.model), find_moments(optimizer)
    return {
        "weights": sum(weights.values()),
        "moments": sum(moments.values()),
        "copies": sum_except(find_storages(list_tensors(optimizer)), weights, moments),
        "gradients": gradients[-1],
        "casts": saved.cast_weights,
        # Of a frozen head it is shaped like no trained matrix.
        "head_cast": 2 * head.numel() if not head.requires_grad else 0,
    }


def show_table(report: dict[str, Any], vocabularies: list[int]) -> list[str]:
    """Markdown; GB = 10⁹ bytes."""
    small, large = vocabularies
    head = f"| loss | layers | peak at {small:,}, GB | at {large:,} | of it own growth | growth beyond |"
    rows = [head, "|---|---|---|---|---|---|"]
    for name, arm in report["arms"].items():
        other = report["arms"].get(name.removesuffix(str(small)) + str(large))
        if arm["vocabulary"] != small or other is None:
            continue
        peaks = [max(item["peak_bytes"].values()) for item in (arm, other)]
        own = sum_own(other["own_bytes"]) - sum_own(arm["own_bytes"])
        growth = (peaks[1] - own) / peaks[0]
        sizes = f"{peaks[0] / 1e9:.2f} | {peaks[1] / 1e9:.2f} | {own / 1e9:.2f}"
        verdict = "" if growth <= TARGET else " (above the target)"
        rows.append(f"| {arm['loss']} | {arm['trainable_layers']} | {sizes} | {growth:.2f}{verdict} |")
    return rows


def sum_own(own: dict[str, int]) -> float:
    """Of several copies of a trained matrix in the compute type one counts: 2 bytes where its gradient has 4."""
    return sum(own.values()) - own["casts"] + min(own["casts"], own["gradients"] / 2)


if __name__ == "__main__":
    main()
