"""Judging whether two programs computed the same: what bench/trl_agreement.py compares, tolerates and reports."""

import math
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

TOLERANCE = 1e-4
"""Largest relative difference that counts as agreement."""
RL_TENSOR_TOLERANCE = 1e-3
"""The same for the gradient of a single tensor of an RL loss, which rounding alone moves further: on the 135M model in
float32 by up to 2.5e-4 between two splits of one batch into micro-batches."""

Gradients = dict[str, Tensor]
"""By the parameter's name."""


@dataclass(frozen=True)
class Recorded:
    """What our half wrote."""

    directory: Path
    contents: dict[str, Any]
    """Of ours.json."""

    def tensors(self, name: str) -> Gradients:
        """One file of tensors: the gradients of a loss, or what else was recorded beside it."""
        return load_file(self.directory / f"{name}.safetensors")


@dataclass(frozen=True)
class Comparison:
    """One quantity, computed by both sides."""

    arm: str
    quantity: str
    ours: float
    trl: float
    relative_difference: float
    should_agree: bool
    """False for controls: a check that cannot tell a wrong loss from ours would prove nothing."""
    tolerance: float = TOLERANCE

    @property
    def is_expected(self) -> bool:
        """Within the tolerance where the two should agree, outside it where they should not."""
        is_finite = math.isfinite(self.relative_difference)  # NaN is no difference that a control is there to show
        return is_finite and (self.relative_difference <= self.tolerance) == self.should_agree


def compare_numbers(arm: str, quantity: str, ours: float, trl: float, should_agree: bool = True) -> Comparison:
    """|ours − TRL's| / |TRL's|."""
    return Comparison(arm, quantity, ours, trl, abs(ours - trl) / abs(trl), should_agree)


def compare_tensors(arm: str, quantity: str, ours: Tensor, trl: Tensor, should_agree: bool = True) -> Comparison:
    """‖ours − TRL's‖ / ‖TRL's‖, beside both norms."""
    return Comparison(arm, quantity, ours.norm().item(), trl.norm().item(), distance(ours, trl), should_agree)


def compare_gradients(
    arm: str, ours: Gradients, trl: Gradients, should_agree: bool = True, *, tensor_tolerance: float = TOLERANCE
) -> Iterator[Comparison]:
    """All parameters as one vector, and, where they should agree, the single tensor that differs most."""
    if ours.keys() != trl.keys():
        raise ValueError(f"{arm}: different parameters have gradients: {sorted(ours.keys() ^ trl.keys())}")
    names = sorted(ours)
    ours_flat, trl_flat = (torch.cat([grads[name].flatten() for name in names]) for grads in (ours, trl))
    yield compare_tensors(arm, f"gradient ({len(names)} tensors)", ours_flat, trl_flat, should_agree)
    if should_agree:
        worst = max(names, key=lambda name: distance(ours[name], trl[name]))
        worst_pair = compare_tensors(arm, f"gradient, worst tensor: {worst}", ours[worst], trl[worst])
        yield replace(worst_pair, tolerance=tensor_tolerance)


def distance(ours: Tensor, trl: Tensor) -> float:
    """Relative distance, computed in float64."""
    return ((ours.double() - trl.double()).norm() / trl.double().norm()).item()


def take_gradients(model: Any) -> Gradients:
    """Every parameter's gradient, by the parameter's name."""
    return {
        name: parameter.grad.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def print_table(title: str, comparisons: list[Comparison]) -> None:
    """One Markdown table per run."""
    print(f"\n### {title}\n\n| arm | quantity | ours | TRL | relative difference | as it should be |")
    print("|---|---|---|---|---|---|")
    for item in comparisons:
        values = f"{item.ours:.7g} | {item.trl:.7g} | {item.relative_difference:.1e}"
        print(f"| {item.arm} | {item.quantity} | {values} | {'yes' if item.is_expected else 'NO'} |")


def report(runs: list[tuple[Recorded, list[Comparison]]]) -> dict[str, Any]:
    """Every number, with what produced it."""
    return {
        "question": "Do our losses and gradients agree with TRL's trainers on the same batch?",
        "machine": f"{platform.system()} {platform.machine()}, CPU, {torch.get_num_threads()} thread(s), float32",
        "versions_trl_half": versions("trl", "torch", "transformers", "accelerate", "datasets"),
        "runs": [
            {
                "model": recorded.contents["model"],
                "seed": recorded.contents["seed"],
                "versions_our_half": recorded.contents["versions"],
                "rl_noise": recorded.contents["rl"]["noise"],
                "rl_ours": recorded.contents["rl"]["results"],
                "comparisons": [asdict(item) | {"is_expected": item.is_expected} for item in comparisons],
            }
            for recorded, comparisons in runs
        ],
    }


def versions(*names: str) -> dict[str, str]:
    """Installed versions, and Python's."""
    return {"python": platform.python_version()} | {name: version(name) for name in names}
