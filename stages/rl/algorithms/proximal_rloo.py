"""Proximal RLOO: RLOO's advantages under a clipped ratio of whole completions.

Paper: Noukhovitch et al. 2024, arXiv:2410.18252 (its RLOO trainer); the ratio's clip is that of PPO, Schulman et al.
2017, arXiv:1707.06347, eq. 7, at the level of completions. With A_i from rloo.py and ρ_i = π(a_i|x_i) / μ(a_i|x_i):

    loss: 1/N Σ_i max(−A_i ρ_i, −A_i clip(ρ_i, 1 − low, 1 + high))

μ is the policy that sampled, by the generator's own log-probabilities: recomputing them with the learner, as the
authors' asynchronous branch does, makes ρ 1 for stale samples and corrects nothing.
Departures: none; `correction: decoupled` is offered besides.
"""

from dataclasses import dataclass

from stages.rl.algorithms.rloo import Rloo


@dataclass(frozen=True, kw_only=True)
class ProximalRloo(Rloo):
    """Rloo with `clip` set and `level` sequence."""
