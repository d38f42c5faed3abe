"""Algorithms as params.yaml builds them, and a random mini-batch that is cut, padded and ordered at will.

Shapes: P prompts of K samples; N trained completions, T completion tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from stages.rl.algorithm_config import AlgorithmConfig
from stages.rl.algorithms import ALGORITHMS
from stages.rl.algorithms.protocol import Algorithm
from stages.rl.records import LossInputs, Predictions, Rollout, Totals
from stages.rl.rollouts import join_inputs

NUM_TOKENS = 5
JUNK = -50.0
"""On padding, where nothing may look."""


def make(name: str, **settings: Any) -> Algorithm:
    config: Any = TypeAdapter(AlgorithmConfig).validate_python({"name": name, **settings})
    return ALGORITHMS[name](**config.model_dump(exclude={"name", "value_lr"}))


@dataclass(frozen=True)
class Case:
    """Everything about the completions of three prompts; all of [N, T], float64."""

    rollout: Rollout
    mask: Tensor
    logprobs: Tensor
    sampling: Tensor
    reference: Tensor
    proximal: Tensor
    values: Tensor

    def compute(
        self, algorithm: Algorithm, *, order: Sequence[int] = (), cuts: Sequence[int] = (), padding: int = 0
    ) -> tuple[float, Tensor]:
        """Loss of the mini-batch and its gradient by the log-probabilities. [] and [N, T]

        Args:
            algorithm: whose.
            order: of the units; left out: as they come.
            cuts: numbers of units at which a new micro-batch begins.
            padding: tokens added to each micro-batch.
        """
        units, _ = algorithm.select(self.rollout)
        units = [units[number] for number in order] if order else units
        edges = [0, *sorted(set(cuts)), len(units)]
        parts = [units[start:end] for start, end in pairwise(edges) if start < end]
        rows = [[row for unit in part for row in unit.rows] for part in parts]
        weights = [[value for unit in part for value in unit.advantages or (0.0,) * len(unit.rows)] for part in parts]
        logprobs = self.logprobs.clone().requires_grad_()
        inputs = [self._inputs(chosen, values, padding) for chosen, values in zip(rows, weights, strict=True)]
        joined, _ = algorithm.compute_advantages(join_inputs(inputs))
        totals = Totals(len(units), int(joined.completion_mask.sum()))
        loss, start = torch.zeros((), dtype=torch.float64), 0
        for chosen, item in zip(rows, inputs, strict=True):
            place = slice(start, start + len(chosen))
            shaped = LossInputs(**{**vars(item), "advantages": joined.advantages[place, : item.advantages.shape[1]]})
            predicted = torch.nn.functional.pad(logprobs[chosen], (0, padding), value=JUNK)
            loss = loss + algorithm.compute_loss(Predictions(predicted, predicted * 0.1), shaped, totals)[0]
            start += len(chosen)
        return loss.item(), torch.autograd.grad(loss, logprobs)[0]

    def _inputs(self, rows: list[int], advantages: list[float], padding: int) -> LossInputs:
        def pad(tensor: Tensor) -> Tensor:
            return torch.nn.functional.pad(tensor[rows], (0, padding), value=JUNK)

        mask = torch.nn.functional.pad(self.mask[rows], (0, padding), value=False)
        per_row = torch.tensor(advantages, dtype=torch.float64)
        return LossInputs(
            completion_mask=mask,
            groups=self.rollout.groups[rows],
            advantages=torch.where(mask, per_row[:, None], 0.0),
            sampling_logprobs=pad(self.sampling),
            reference_logprobs=pad(self.reference),
            proximal_logprobs=pad(self.proximal),
            values=pad(self.values),
        )


def draw_case(seed: int, *, samples_per_prompt: int, with_greedy: bool, on_policy: bool = False) -> Case:
    g = torch.Generator().manual_seed(seed)
    num_each = samples_per_prompt + int(with_greedy)
    num_rows = 3 * num_each
    lengths = torch.randint(1, NUM_TOKENS + 1, (num_rows,), generator=g)
    mask = torch.arange(NUM_TOKENS) < lengths[:, None]

    def draw() -> Tensor:
        return torch.where(mask, -torch.rand(num_rows, NUM_TOKENS, generator=g, dtype=torch.float64), JUNK)

    logprobs, sampling, reference, proximal, values = (draw() for _ in range(5))
    rollout = Rollout(
        scores=torch.randn(num_rows, generator=g, dtype=torch.float64),
        is_finished=torch.ones(num_rows, dtype=torch.bool),
        is_greedy=torch.arange(num_rows) % num_each >= samples_per_prompt,
        groups=torch.arange(num_rows) // num_each,
    )
    if on_policy:
        sampling = proximal = logprobs
    return Case(rollout, mask, logprobs, sampling, reference, proximal, values)
