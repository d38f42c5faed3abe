"""Online DPO: the best and the worst of K samples are a fresh preference pair.

Paper: Guo et al. 2024, arXiv:2402.04792 (online DPO); Rafailov et al. 2023, arXiv:2305.18290, eq. 7 (sigmoid);
Azar et al. 2023, arXiv:2310.12036, eq. 17 (ipo); as the asynchronous learner's objective Noukhovitch et al. 2024,
arXiv:2410.18252. With Δ = log-ratio of the chosen minus that of the rejected completion, sums over tokens:

    sigmoid:  −log σ(β Δ)          ipo:  (Δ − 1/(2β))²

Departures: a prompt whose samples all score alike gives no pair (and is counted) instead of an arbitrary one; a
finished completion always beats an unfinished one.
Shapes: B = 2P completions with chosen and rejected in turn, T completion tokens, P pairs.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from stages.common.metrics import Mean
from stages.rl.algorithms.advantages import rows_by_group
from stages.rl.algorithms.protocol import Algorithm
from stages.rl.records import LossInputs, Predictions, Rollout, Totals, Unit
from stages.rl.tensors import require_shape


@dataclass(frozen=True, kw_only=True)
class OnlineDpo(Algorithm):
    """Preference pairs from the policy's own samples."""

    samples_per_prompt: int
    """K ≥ 2."""
    beta: float
    """Strength of the pull towards the reference."""
    loss: Literal["sigmoid", "ipo"]

    @property
    def num_samples(self) -> int:
        """K, completions sampled for each prompt."""
        return self.samples_per_prompt

    @property
    def needs_reference(self) -> bool:
        """Both losses read it."""
        return True

    def select(self, rollout: Rollout) -> tuple[list[Unit], dict[str, Mean]]:
        """Best and worst of each prompt; prompts without a difference are left out."""
        members = rows_by_group(rollout)
        pairs = [pair for rows in members if (pair := find_pair(rollout, rows)) is not None]
        margins = [float(rollout.scores[best] - rollout.scores[worst]) for best, worst in pairs]
        return [Unit(pair) for pair in pairs], {
            "online_dpo/tied_prompts": Mean(len(members) - len(pairs), len(members)),
            "online_dpo/score_margin": Mean(sum(margins), len(margins)),
        }

    def compute_loss(
        self, predictions: Predictions, inputs: LossInputs, totals: Totals
    ) -> tuple[Tensor, dict[str, Mean]]:
        """See `Algorithm.compute_loss`; the unit is a pair."""
        delta = compute_delta(predictions.logprobs, inputs.reference_logprobs, inputs.completion_mask)  # [P]
        loss = compute_loss(delta, beta=self.beta, loss=self.loss, num_pairs=totals.num_units)
        return loss, {
            "online_dpo/delta": Mean(delta.detach().sum(), len(delta)),
            "online_dpo/accuracy": Mean((delta > 0).sum(), len(delta)),
        }


def find_pair(rollout: Rollout, rows: list[int]) -> tuple[int, int] | None:
    """(best, worst) of one prompt's completions by (finished, score), or None where all are equal."""
    keys = {row: (bool(rollout.is_finished[row]), float(rollout.scores[row])) for row in rows}
    best = max(rows, key=lambda row: keys[row])
    worst = min(rows, key=lambda row: keys[row])
    return None if keys[best] == keys[worst] else (best, worst)


def compute_delta(logprobs: Tensor, reference_logprobs: Tensor, completion_mask: Tensor) -> Tensor:
    """Log-ratio of each chosen completion minus that of its rejected one, in nats. [B, T] -> [P]"""
    require_shape("reference_logprobs", reference_logprobs, logprobs.shape)
    require_shape("completion_mask", completion_mask, logprobs.shape)
    ratios = torch.where(completion_mask, logprobs - reference_logprobs.detach(), 0.0).sum(dim=1)  # [B]
    return ratios[0::2] - ratios[1::2]


def compute_loss(delta: Tensor, *, beta: float, loss: Literal["sigmoid", "ipo"], num_pairs: int) -> Tensor:
    """Share of the mean loss over `num_pairs` pairs. [P] -> []"""
    per_pair = -logsigmoid(beta * delta) if loss == "sigmoid" else (delta - 1 / (2 * beta)).square()
    return per_pair.sum() / num_pairs
