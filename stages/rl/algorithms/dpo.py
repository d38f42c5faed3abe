"""DPO: preference pairs that are there already; the policy itself is their reward model.

Paper: Rafailov et al. 2023, arXiv:2305.18290, eq. 7 (sigmoid); Azar et al. 2023, arXiv:2310.12036, eq. 17 (ipo).
The implicit reward of a completion is β (log π − log π_ref), summed over its tokens, the end-of-sequence token
included; β Δ is that of the chosen completion minus that of the rejected one:

    sigmoid:  −log σ(β Δ)          ipo:  (Δ − 1/(2β))²

The same loss as in online_dpo.py, on pairs that no policy of this run sampled. So this is a function and not an
`Algorithm`: there is nothing to sample and nothing to select.
Departures: log-probabilities are those at `generation.temperature`, the distribution that is sampled and judged
afterwards; the papers' is 1. A pair with Δ = 0 counts half in the accuracy, as it does for the reward model.
Shapes: B = 2P completions with chosen and rejected in turn, T completion tokens, P pairs.
"""

from typing import Literal

import torch
from torch import Tensor

from stages.common.metrics import Mean
from stages.rl.algorithms.online_dpo import compute_delta, compute_loss


def compute_pair_loss(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    completion_mask: Tensor,
    *,
    beta: float,
    loss: Literal["sigmoid", "ipo"],
    num_pairs: int,
) -> tuple[Tensor, dict[str, Mean]]:
    """Loss of one micro-batch of whole pairs; over all micro-batches and ranks the shares add up to the batch's.

    Args:
        logprobs: the learner's, in nats, with gradient. [B, T]
        reference_logprobs: the frozen SFT model's, in nats. [B, T]
        completion_mask: True on completion tokens, the end-of-sequence token included. [B, T]
        beta: strength of the pull towards the reference.
        loss: see above.
        num_pairs: pairs in the whole batch over all ranks: the normaliser.

    Raises:
        ValueError: shapes differ.
    """
    delta = compute_delta(logprobs, reference_logprobs, completion_mask)  # [P]
    share = compute_loss(delta, beta=beta, loss=loss, num_pairs=num_pairs)
    ratios = torch.where(completion_mask, logprobs - reference_logprobs, 0.0).detach().sum(dim=1)  # [B]
    delta = delta.detach()
    return (
        share,
        {
            "dpo/accuracy": Mean(((delta.sign() + 1) / 2).sum(), len(delta)),  # 1 right, 0 wrong, a half for a tie
            "dpo/margin": Mean(beta * delta.sum(), len(delta)),
            "dpo/chosen_reward": Mean(beta * ratios[0::2].sum(), len(delta)),
        },
    )
