"""Shares of a mini-batch on two ranks of a gloo process group, and through the real learner on both of them.

python -m tests.unit.rl.algorithms.ranks OUT        with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT set

Shapes: N completions of a case, T completion tokens.
"""

import functools
import os
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from stages.generation.protocol import Group
from stages.learner.config import LearnerConfig
from stages.learner.engine import Learner
from stages.rl.algorithms.dpo import compute_pair_loss
from stages.rl.algorithms.protocol import Algorithm
from stages.rl.mini_batch import Preparation
from stages.rl.records import Totals
from stages.rl.rollouts import Budget, Member, Reference, build_rollout, compute_loss, split_units
from tests.fakes import make_completion
from tests.tiny import tiny_llama
from tests.unit.rl.algorithms.cases import VARIANTS, Case, Part, draw_case, make

NUM_PROMPTS = 5
SPLITS = ("3 to 2", "shuffled", "one and the rest")
Share = tuple[Tensor, Tensor]
"""Loss, gradient by the log-probabilities of all completions. [], [N, T]"""
AddUp = Callable[[Tensor], Tensor]
"""Sum of a tensor over all ranks; on a single one the tensor itself."""


def compute_shares(rank: int | None, add_up: AddUp) -> dict[tuple[int, str], Share]:
    """Summed loss and gradient of every variant and split; with rank None all of it is this process's."""
    found = {}
    for number, (name, options) in enumerate(VARIANTS):
        algorithm = make(name, **options)
        case = draw_case(
            7, samples_per_prompt=algorithm.num_samples, with_greedy=algorithm.with_greedy, num_prompts=NUM_PROMPTS
        )
        for split in SPLITS:
            parts = _split(case, algorithm, split)
            mine = parts if rank is None else parts[rank : rank + 1]
            found[number, split] = _compute_share(case, algorithm, mine, add_up)
    return found


def _split(case: Case, algorithm: Algorithm, split: str) -> list[Part]:
    """Two parts. As units come in the order of prompts, each part then lacks some prompts altogether."""
    num_units = len(algorithm.select(case.rollout)[0])
    order = random.Random(1).sample(range(num_units), num_units) if split == "shuffled" else ()
    cut = 1 if split == "one and the rest" else -(-3 * num_units // NUM_PROMPTS)
    return case.lay_out(algorithm, order=order, cuts=[cut])


def _compute_share(case: Case, algorithm: Algorithm, parts: Sequence[Part], add_up: AddUp) -> Share:
    counts = [sum(part.num_units for part in parts), sum(part.num_tokens for part in parts)]
    totals = Totals(*(int(count) for count in add_up(torch.tensor(counts))))
    loss, gradient = case.compute_share(algorithm, parts, totals)
    value_loss, value_gradient = _compute_value_share(case, algorithm, parts, totals)
    return add_up(torch.tensor(loss + value_loss, dtype=torch.float64)), add_up(gradient + value_gradient)


def _compute_value_share(
    case: Case, algorithm: Algorithm, parts: Sequence[Part], totals: Totals
) -> tuple[float, Tensor]:
    """The same of the value model, by the values; nothing for algorithms without one."""
    if algorithm.value_model is None:
        return 0.0, torch.zeros_like(case.values)
    values = (case.values * 1.1).requires_grad_()
    shares = [algorithm.value_model.compute_loss(part.pad(values), part.inputs, totals)[0] for part in parts]
    loss = torch.stack(shares).sum()
    return loss.item(), torch.autograd.grad(loss, values)[0]


def compute_pair_shares(rank: int | None, add_up: AddUp) -> dict[str, Share]:
    """The same of offline DPO: five pairs, three of them on the first rank."""
    case = draw_case(3, samples_per_prompt=2, with_greedy=False, num_prompts=NUM_PROMPTS)
    rows = {None: slice(None), 0: slice(0, 6), 1: slice(6, None)}[rank]
    num_pairs = int(add_up(torch.tensor(len(case.mask[rows]) // 2)))
    found = {}
    for kind in ("sigmoid", "ipo"):
        logprobs = case.logprobs.clone().requires_grad_()
        loss, _ = compute_pair_loss(
            logprobs[rows], case.reference[rows], case.mask[rows], beta=0.3, loss=kind, num_pairs=num_pairs
        )
        (gradient,) = torch.autograd.grad(loss, logprobs)
        found[kind] = add_up(loss.detach()), add_up(gradient)
    return found


def train_shares(rank: int | None, add_up: AddUp) -> dict[int, dict[str, Tensor]]:
    """One update of a two-layer model by the real learner for every variant: loss, gradient norm, new weights."""
    return {number: _train_share(name, options, rank, add_up) for number, (name, options) in enumerate(VARIANTS)}


def _train_share(name: str, options: dict[str, Any], rank: int | None, add_up: AddUp) -> dict[str, Tensor]:
    config = LearnerConfig(lr=1e-3, dtype="fp32", max_grad_norm=1e3, warmup_fraction=0.0)
    algorithm, reference = make(name, **options), Reference(tiny_llama(0), "fp32", 1.0)
    with TemporaryDirectory() as rescue:
        learner = Learner(tiny_llama(1), config, 2, Path(rescue))
        preparation = Preparation(algorithm, None, -1.0, reference, Reference(learner.model, "fp32", 1.0), 10_000)
        split = _split_members(algorithm)
        micro_batches, _ = preparation.build(split)
        place = slice(None) if rank is None else slice(rank, rank + 1)
        masks = [item.inputs.completion_mask for item in micro_batches[place]]
        num_units = sum(len({member.unit for member in members}) for members in split[place])
        counts = torch.tensor([num_units, sum(int(mask.sum()) for mask in masks)])
        totals = Totals(*(int(count) for count in add_up(counts)))
        loss = functools.partial(compute_loss, algorithm=algorithm, totals=totals, reference=reference)
        metrics = learner.update(micro_batches[place], loss)
    weights = {key: value.detach().clone() for key, value in learner.model.named_parameters()}
    return weights | {
        "loss": add_up(torch.tensor(float(metrics["learner/loss"].total))),
        "grad_norm": torch.tensor(metrics["learner/grad_norm"].value),
    }


def _split_members(algorithm: Algorithm) -> list[list[Member]]:
    """Rows of two micro-batches: the first three of five units, and the rest."""
    g = torch.Generator().manual_seed(5)
    groups = [_sample_group(prompt, algorithm, g) for prompt in range(NUM_PROMPTS)]
    completions = [completion for group in groups for completion in group]
    units, _ = algorithm.select(build_rollout(groups, torch.randn(len(completions), generator=g).tolist()))
    tickets = [number for number, group in enumerate(groups) for _ in group]
    (members,) = split_units(completions, tickets, units, [None] * len(completions), Budget(10_000))
    # Values as a value model would give them; other algorithms do not look.
    members = [replace(item, values=_draw(len(item.completion.token_ids), g)) for item in members]
    cut = -(-3 * len(units) // NUM_PROMPTS)
    return [[item for item in members if item.unit < cut], [item for item in members if item.unit >= cut]]


def _sample_group(prompt: int, algorithm: Algorithm, g: torch.Generator) -> Group:
    group = []
    for index in range(algorithm.num_samples + int(algorithm.with_greedy)):
        length = int(torch.randint(1, 7, (1,), generator=g))
        token_ids = tuple(torch.randint(3, 250, (length,), generator=g).tolist())
        completion = make_completion("x", prompt_id=f"p{prompt}", sample_index=index, token_ids=token_ids)
        # Near -log 259, what the random model gives a token, so that ratios stay near 1.
        sampling = tuple(value - 5.0 for value in _draw(length, g))
        group.append(replace(completion, sampling_logprobs=sampling, is_greedy=index >= algorithm.num_samples))
    return tuple(group)


def _draw(num: int, g: torch.Generator) -> tuple[float, ...]:
    return tuple((torch.randn(num, generator=g) * 0.3).tolist())


def keep(tensor: Tensor) -> Tensor:
    """The sum over a single rank."""
    return tensor


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of every rank's tensor, on each of them."""
    dist.all_reduce(tensor)
    return tensor


def main() -> None:
    """Compute this rank's shares and write the sums that it got."""
    import deepspeed.ops

    # As the learner says of a single rank: building the shared-memory reduction takes a compiler and 20 s.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = int(os.environ["RANK"])
    found = {
        "shares": compute_shares(rank, sum_over_ranks),
        "pairs": compute_pair_shares(rank, sum_over_ranks),
        "trained": train_shares(rank, sum_over_ranks),
    }
    torch.save(found, Path(sys.argv[1]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
