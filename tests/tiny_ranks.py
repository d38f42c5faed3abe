"""A two-layer model trained by several ranks, in every way its weights can be shared out.

python -m tests.tiny_ranks NUM_RANKS DIRECTORY CASES_AS_JSON        writes DIRECTORY/found-NUM_RANKS.pt
"""

import functools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from transformers import PreTrainedModel

from stages.common.entry import run_entry
from stages.common.metrics import Mean
from stages.data.batches import SequenceBatch, collate, split_by_tokens
from stages.data.text import TokenSequence
from stages.learner import engine
from stages.learner.config import LearnerConfig
from stages.learner.frozen import load_frozen_policy
from stages.learner.launch import open_ranks, serve_leader
from stages.learner.logprobs import compute_logprobs, compute_logprobs_and_kl
from stages.learner.ranks import Ranks
from stages.learner.trainable import load_trained_policy
from stages.models.sharding import call_as_forward
from stages.rl.rollouts import Reference
from tests.tiny import save_tiny_model

SEQUENCES = [TokenSequence((5, 6, 7), tuple(range(20, 20 + n))) for n in (3, 5, 2, 7, 4, 6, 1)]
NUM_TOKENS = sum(len(sequence.completion_ids) for sequence in SEQUENCES)
NUM_UPDATES = 3
Case = dict[str, Any]
"""Settings of the learner; besides those of `EXTRA`."""
EXTRA = ("max_tokens", "resumed", "is_poisoned", "is_shared")
"""Size of a micro-batch, a checkpoint to go on from, whether the loss is not finite, whether prompts are shared."""
Found = dict[str, Any]


def train(ranks: Ranks, directory: Path, case: Case) -> Found:
    """Three updates: their metrics, what they gave, and a checkpoint after the first."""
    settings = {"lr": 1e-2, "dtype": "fp32", "warmup_fraction": 0.0, "weight_decay": 0.1, "num_ranks": ranks.size}
    settings |= {name: value for name, value in case.items() if name not in EXTRA}
    config = LearnerConfig.model_validate(settings)
    make_model = functools.partial(load_sharded, directory / "model", config)
    learner = ranks.make_learner(make_model, config, NUM_UPDATES, directory)
    policy = Reference(learner.model, "fp32", 1.0)
    reference = Reference(learner.model, "fp32", 1.0, is_without_adapters=True)
    # Seven sequences cannot be shared evenly by two ranks or by four.
    share = case.get("is_shared", False)
    batches = split(case["max_tokens"]) if "max_tokens" in case else split(24, ranks.size, share_prompts=share)
    if "resumed" in case:
        learner.load(directory / case["resumed"])
    metrics, loss = [], poison if case.get("is_poisoned") else compute_loss
    while learner.updates < NUM_UPDATES:
        metrics.append({name: mean.value for name, mean in learner.update(batches, loss).items()})
        if learner.updates == 1:
            saved = directory / name_checkpoint(ranks.size, case)
            saved.mkdir()
            learner.save(saved)
    frozen = ranks.make_frozen(functools.partial(load_frozen_policy, directory / "model", config))
    of_frozen = functools.partial(compare, learner.model, frozen)
    found = {
        "metrics": metrics,
        "weights": learner.collect_weights(),
        "trained": sorted(learner.collect_trained()),
        "logprobs": [tensor.sum(dim=1) for tensor in ranks.map(policy.compute, batches)],
        "frozen_held": count_held(frozen),
        "frozen_logprobs": [tensor.sum(dim=1) for tensor in ranks.map(Reference(frozen, "fp32", 1.0).compute, batches)],
        "frozen_kl": [tensor.sum(dim=1) for tensor in ranks.map(of_frozen, batches)],
        "reference_logprobs": [tensor.sum(dim=1) for tensor in ranks.map(reference.compute, batches)],
    }
    ranks.drop(frozen)
    return found | {"frozen_left": count_held(frozen)}


def count_held(model: PreTrainedModel) -> int:
    """Numbers of the model's weights on this rank."""
    return sum(getattr(weight, "ds_tensor", weight).numel() for weight in model.parameters())


def name_checkpoint(num_ranks: int, case: Case) -> str:
    """Directory that `train` saves into."""
    return f"{num_ranks} ranks {json.dumps(case, sort_keys=True)}".replace('"', "")


def load_sharded(path: Path, config: LearnerConfig) -> PreTrainedModel:
    """The model, whose small weights are to be shared out too."""
    engine.WHOLE_BELOW = 0
    return load_trained_policy(path, config, "sft.learner")


def compute_loss(model: PreTrainedModel, batch: SequenceBatch) -> tuple[Tensor, dict[str, Mean]]:
    nll = -compute_logprobs(model, batch).sum()
    return nll / NUM_TOKENS, {"test/nll": Mean(nll.detach(), batch.completion_mask.sum())}


def compare(model: PreTrainedModel, frozen: PreTrainedModel, batch: SequenceBatch) -> Tensor:
    """Exact KL of the learner to the frozen model. [B, T]"""
    with torch.no_grad():
        return call_as_forward(model, compute_logprobs_and_kl, frozen, batch, 1.0)[1]


def poison(model: PreTrainedModel, batch: SequenceBatch) -> tuple[Tensor, dict[str, Mean]]:
    """A loss that is not finite on ranks other than 0."""
    loss, metrics = compute_loss(model, batch)
    return loss * (float("nan") if dist.get_rank() else 1.0), metrics


def split(max_tokens: int, num_ranks: int = 1, *, share_prompts: bool = False) -> list[SequenceBatch]:
    groups = split_by_tokens([len(sequence) for sequence in SEQUENCES], max_tokens, num_ranks)
    return [collate([SEQUENCES[index] for index in group], share_prompts=share_prompts) for group in groups]


def main() -> None:
    num_ranks, directory, cases = int(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    torch.set_num_threads(1)
    config = LearnerConfig(lr=1.0, num_ranks=num_ranks)
    if not (directory / "model").exists():
        save_tiny_model(directory / "model")
    if serve_leader(config, "sft.learner"):
        return
    with open_ranks(config, "sft.learner", directory, devices=range(num_ranks)) as ranks:
        found = [train(ranks, directory, case) for case in cases]
    torch.save(found, directory / f"found-{num_ranks}.pt")


if __name__ == "__main__":
    # As the other ranks know it: what is defined in `__main__` cannot be sent to them.
    from tests import tiny_ranks

    run_entry(tiny_ranks.main)
