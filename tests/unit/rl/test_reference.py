from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from stages.data.batches import collate
from stages.data.text import TokenSequence
from stages.learner.config import LearnerConfig, LoraConfig
from stages.learner.lora import add_adapters
from stages.learner.ranks import MakeModel, Ranks
from stages.rl.algorithm_config import AlgorithmConfig
from stages.rl.algorithms import ALGORITHMS
from stages.rl.reference import ReferenceSource, reads_reference
from stages.rl.rollouts import Reference
from tests.tiny import save_tiny_model, tiny_llama

BATCH = collate([TokenSequence((5, 6, 7), (20, 21, 22))])


class CountingRanks(Ranks):
    """Notes how many models it has been asked for and still has."""

    def __init__(self) -> None:
        self.num_models = 0
        self.num_loaded = 0

    def make_frozen(self, make_model: MakeModel) -> torch.nn.Module:  # type: ignore[override]
        self.num_models += 1
        self.num_loaded += 1
        return super().make_frozen(make_model)

    def drop(self, model: torch.nn.Module) -> None:  # type: ignore[override]  # noqa: ARG002
        self.num_models -= 1


@pytest.mark.parametrize(
    ("name", "options", "live", "recorded"),
    [
        ("online_dpo", {}, True, False),
        ("best_of_n", {}, False, False),
        ("rloo", {"kl_coef": 0.1}, True, False),
        ("rloo", {"kl_coef": 0.0}, False, False),
        ("rloo", {"kl_coef": 0.0, "kl_loss_coef": 0.1, "kl_loss_estimator": "k3"}, True, False),
        ("rloo", {"kl_coef": 0.0, "kl_loss_coef": 0.1, "kl_loss_estimator": "exact"}, True, True),
    ],
)
def test_only_algorithms_with_a_kl_keep_the_reference(
    name: str, options: dict[str, Any], live: bool, recorded: bool
) -> None:
    config: Any = TypeAdapter(AlgorithmConfig).validate_python({"name": name} | options)
    algorithm = ALGORITHMS[name](**config.model_dump(exclude={"name"}))

    assert reads_reference(algorithm, are_recorded=False) is live
    assert reads_reference(algorithm, are_recorded=True) is recorded


def test_a_borrowed_reference_is_let_go_and_a_loaded_one_stays(tmp_path: Path) -> None:
    ranks = CountingRanks()
    policy = Reference(tiny_llama(), "fp32", 0.7)
    source = ReferenceSource(ranks, save_tiny_model(tmp_path / "sft"), policy, LearnerConfig(lr=1.0, dtype="fp32"))

    with source.borrow(None) as reference:
        assert ranks.num_models == 1
        torch.testing.assert_close(reference.compute(BATCH), policy.compute(BATCH))
    assert ranks.num_models == 0

    loaded = source.load()
    with source.borrow(loaded) as reference:
        assert reference is loaded
    assert (ranks.num_models, ranks.num_loaded) == (1, 2)


def test_with_adapters_the_reference_is_the_learner_without_them_and_nothing_is_loaded(tmp_path: Path) -> None:
    ranks, model = CountingRanks(), tiny_llama()
    add_adapters(model, LoraConfig(rank=4), "all", "rl.learner")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    policy = Reference(model, "fp32", 0.7)

    with ReferenceSource(ranks, tmp_path, policy, LearnerConfig(lr=1.0, lora=LoraConfig(rank=4))).borrow(
        None
    ) as reference:
        found = reference.compute(BATCH)

    assert ranks.num_loaded == 0
    torch.testing.assert_close(found, Reference(tiny_llama(), "fp32", 0.7).compute(BATCH), rtol=0, atol=0)
    assert not torch.allclose(policy.compute(BATCH), found)
