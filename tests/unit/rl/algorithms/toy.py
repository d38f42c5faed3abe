"""A policy over a toy vocabulary, small enough to enumerate every completion: expectations become sums.

Three tokens, of which token 0 ends the completion, and at most three of them: 15 completions.
"""

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

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
