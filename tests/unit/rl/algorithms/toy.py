"""A policy over a toy vocabulary, small enough to enumerate every completion: expectations become sums.

Three tokens, of which token 0 ends the completion, and at most three of them: 15 completions.
"""

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from stages.rl.algorithms.protocol import Algorithm
from stages.rl.records import LossInputs, Predictions, Rollout, Totals

VOCABULARY, MAX_TOKENS, EOS = 3, 3, 0


@dataclass(frozen=True)
class Enumeration:
    """Every completion of the toy vocabulary. B = 15, T = 3."""

    token_ids: Tensor  # [B, T]
    mask: Tensor  # [B, T]


def enumerate_completions() -> Enumeration:
    found = set()
    for tokens in product(range(VOCABULARY), repeat=MAX_TOKENS):
        end = tokens.index(EOS) + 1 if EOS in tokens else MAX_TOKENS
        found.add(tokens[:end])
    rows = sorted(found)
    token_ids = torch.tensor([[*row, *[0] * (MAX_TOKENS - len(row))] for row in rows])
    mask = torch.tensor([[t < len(row) for t in range(MAX_TOKENS)] for row in rows])
    return Enumeration(token_ids, mask)


def toy_logprobs(table: Tensor, all_completions: Enumeration) -> Tensor:
    """Log-probability of each token; a token's distribution depends on the one before it.

    Args:
        table: logits by place and previous token (V stands for none). [T, V + 1, V]
    """
    log_softmax = torch.log_softmax(table, dim=-1)
    num_rows = len(all_completions.token_ids)
    previous = torch.cat([torch.full((num_rows, 1), VOCABULARY), all_completions.token_ids[:, :-1]], dim=1)
    places = torch.arange(MAX_TOKENS).expand(num_rows, -1)
    return log_softmax[places, previous, all_completions.token_ids]  # [B, T]


def greedy_completion(table: Tensor, all_completions: Enumeration) -> int:
    """Row of the completion made of the most likely tokens."""
    tokens, previous = [], VOCABULARY
    for place in range(MAX_TOKENS):
        previous = int(table[place, previous].argmax())
        tokens.append(previous)
        if previous == EOS:
            break
    padded = tokens + [0] * (MAX_TOKENS - len(tokens))
    matches = (all_completions.token_ids == torch.tensor(padded)).all(dim=1)
    matches &= all_completions.mask.sum(dim=1) == len(tokens)
    return int(matches.nonzero()[0])


@dataclass(frozen=True)
class Toy:
    """A reward, a reference and a learner over the toy vocabulary. B = 15, T = 3."""

    table: Tensor  # the learner's logits, with gradient
    reference: Tensor  # [B, T]
    scores: Tensor  # [B]

    def compute_exact_gradient(self, kl_coef: float) -> Tensor:
        """d E[score - kl_coef KL] / d table, by autograd of the sum over all completions."""
        completions = enumerate_completions()
        per_token = torch.where(completions.mask, toy_logprobs(self.table, completions), 0.0)
        probabilities = per_token.sum(1).exp()
        torch.testing.assert_close(probabilities.sum(), torch.tensor(1.0, dtype=torch.float64))
        log_ratios = torch.where(completions.mask, per_token - self.reference, 0.0).sum(1)
        objective = (probabilities * (self.scores - kl_coef * log_ratios)).sum()
        return torch.autograd.grad(objective, self.table)[0]

    def compute_expected_gradient(
        self, algorithm: Algorithm, sampling_table: Tensor, *, num_prompts: int = 1
    ) -> Tensor:
        """-gradient of the loss of the prompts' samples (and greedy completion), over all of them with their
        probabilities. Prompts are alike; several are for algorithms of one sample each, without a greedy one."""
        completions = enumerate_completions()
        sampling = torch.where(completions.mask, toy_logprobs(sampling_table.detach(), completions), 0.0)
        probabilities = sampling.sum(1).exp().tolist()
        greedy = [greedy_completion(sampling_table, completions)] if algorithm.with_greedy else []
        expected = torch.zeros_like(self.table)
        for samples in product(range(len(probabilities)), repeat=algorithm.num_samples * num_prompts):
            rows = [*samples, *greedy]
            rollout = Rollout(
                scores=self.scores[rows],
                is_finished=torch.ones(len(rows), dtype=torch.bool),
                is_greedy=torch.tensor([False] * len(samples) + [True] * len(greedy)),
                groups=torch.arange(len(rows)) % num_prompts,
            )
            units, _ = algorithm.select(rollout)
            chosen = [rows[row] for unit in units for row in unit.rows]
            advantages = torch.tensor([value for unit in units for value in unit.advantages], dtype=torch.float64)
            mask = completions.mask[chosen]
            inputs = LossInputs(
                completion_mask=mask,
                groups=rollout.groups[[row for unit in units for row in unit.rows]],
                advantages=torch.where(mask, advantages[:, None], 0.0),
                sampling_logprobs=sampling[chosen],
                reference_logprobs=self.reference[chosen],
            )
            inputs, _ = algorithm.compute_advantages(inputs)
            predictions = Predictions(toy_logprobs(self.table, completions)[chosen])
            loss, _ = algorithm.compute_loss(predictions, inputs, Totals(len(units), int(mask.sum())))
            weight = torch.tensor([probabilities[row] for row in samples], dtype=torch.float64).prod()
            expected -= weight * torch.autograd.grad(loss, self.table)[0]
        return expected


def make_toy(seed: int) -> tuple[Toy, Tensor]:
    """And the logits of an older policy."""
    g = torch.Generator().manual_seed(seed)
    completions = enumerate_completions()
    table, reference, old_table = (torch.randn(3, 4, 3, generator=g, dtype=torch.float64) for _ in range(3))
    scores = torch.randn(len(completions.mask), generator=g, dtype=torch.float64)
    return Toy(table.requires_grad_(), toy_logprobs(reference, completions), scores), old_table
