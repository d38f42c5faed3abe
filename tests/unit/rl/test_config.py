from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from ruamel.yaml import YAML

from stages.common.config import load_section, read_params
from stages.common.errors import SettingError
from stages.learner.config import LearnerConfig
from stages.rl.algorithm_config import DpoConfig, OnlineDpoConfig
from stages.rl.config import RlConfig
from stages.rl.staleness import StalenessRule


def make(num_updates: int, n: int, t: int, max_staleness: int) -> RlConfig:
    return RlConfig(
        algorithm=OnlineDpoConfig(name="online_dpo"),
        learner=LearnerConfig(lr=1e-4),
        num_updates=num_updates,
        prompts_per_update=5,
        updates_per_rollout=n,
        epochs_per_rollout=t,
        max_staleness=max_staleness,
    )


@pytest.mark.parametrize(
    ("n", "t", "max_staleness", "message"),
    [
        (
            2,
            3,
            4,
            "rl.max_staleness=4 cannot be kept: rl.updates_per_rollout=2 x rl.epochs_per_rollout=3 = 6 updates a "
            "rollout, and the last of them trains samples 5 updates old even when nothing runs ahead; allowed: "
            "5 (synchronous), 11 (one step off) or any other number from 5 on",
        ),
        (
            1,
            2,
            0,
            "rl.max_staleness=0 cannot be kept: rl.updates_per_rollout=1 x rl.epochs_per_rollout=2 = 2 updates a "
            "rollout, and the last of them trains samples 1 updates old even when nothing runs ahead; allowed: "
            "1 (synchronous), 3 (one step off) or any other number from 1 on",
        ),
    ],
)
def test_a_bound_that_no_run_can_keep_is_refused_with_those_it_can(
    n: int, t: int, max_staleness: int, message: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        make(12, n, t, max_staleness)

    assert [str(problem["ctx"]["error"]) for problem in caught.value.errors()] == [message]


def test_a_run_that_would_end_within_a_rollout_is_refused() -> None:
    message = r"rl\.num_updates=10 is not a multiple of rl\.updates_per_rollout=2 x .* = 4 updates a rollout"
    with pytest.raises(ValidationError, match=message):
        make(10, 2, 2, 3)


@pytest.mark.parametrize(("n", "t", "max_staleness"), [(1, 1, 0), (2, 3, 5), (2, 3, 6), (2, 3, 11), (2, 3, 100)])
def test_every_bound_from_synchronous_on_is_allowed(n: int, t: int, max_staleness: int) -> None:
    config = make(12, n, t, max_staleness)

    assert config.rule == StalenessRule(max_staleness, n, t, prompts_per_update=5)


def test_a_negative_bound_is_refused() -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        make(12, 1, 1, -1)


def load_edited(folder: Path, **changes: Any) -> RlConfig:
    params = read_params()
    params["rl"] |= changes
    YAML().dump(params, folder / "params.yaml")
    return load_section("rl", RlConfig, folder / "params.yaml")


def test_the_name_alone_turns_the_shipped_settings_into_offline_dpo(tmp_path: Path) -> None:
    config = load_edited(tmp_path, algorithm=read_params()["rl"]["algorithm"] | {"name": "dpo"})

    assert config.is_offline
    assert config.algorithm == DpoConfig(name="dpo", beta=0.1, loss="sigmoid")
    assert not load_section("rl", RlConfig).is_offline


def test_an_offline_run_need_not_be_a_whole_number_of_rollouts(tmp_path: Path) -> None:
    config = load_edited(tmp_path, algorithm={"name": "dpo"}, num_updates=7, updates_per_rollout=2, max_staleness=0)

    assert config.num_updates == 7


def test_an_offline_run_cannot_replay_samples(tmp_path: Path) -> None:
    with pytest.raises(SettingError) as caught:
        load_edited(tmp_path, algorithm={"name": "dpo"}, replay_from="inputs/ledger/earlier")

    assert str(caught.value) == (
        "rl.replay_from='inputs/ledger/earlier' with rl.algorithm.name='dpo': offline DPO trains on artifacts/pairs, "
        "not on recorded samples; set rl.replay_from to null"
    )


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        ({"name": "dpo", "beta": 0}, "rl.algorithm.beta=0: input should be greater than 0"),
        ({"name": "dpo", "loss": "hinge"}, "rl.algorithm.loss='hinge': input should be 'sigmoid' or 'ipo'"),
        ({"name": "dpo", "label_smoothing": 0.1}, "rl.algorithm.label_smoothing: unknown setting"),
    ],
)
def test_a_wrong_setting_of_dpo_is_named(tmp_path: Path, algorithm: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError) as caught:
        load_edited(tmp_path, algorithm=algorithm)

    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"algorithm": {"name": "reinforce"}, "prompts_per_update": 1},
            "rl.algorithm.baseline='other_prompts' with rl.prompts_per_update=1 is no baseline",
        ),
        (
            {"algorithm": {"name": "grpo", "kl_loss_estimator": "exact"}, "reference_on": "generator"},
            "rl.reference_on='generator' with rl.algorithm.kl_loss_estimator='exact'",
        ),
        (
            {"generator": {"kv_cache": "recompute"}, "weight_update": "drain"},
            "rl.generator.kv_cache='recompute' does nothing with rl.weight_update='drain'",
        ),
        ({"missing_eos_score": float("nan")}, "rl.missing_eos_score=nan"),
        ({"missing_eos_score": float("-inf")}, "rl.missing_eos_score=-inf"),
    ],
)
def test_what_does_nothing_or_cannot_be_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError) as caught:
        load_edited(tmp_path, **changes)

    assert message in str(caught.value)
