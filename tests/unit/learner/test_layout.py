from pathlib import Path

import pytest

from stages.common.errors import InputError
from stages.learner.checkpoint import commit_checkpoint
from stages.learner.config import LearnerConfig, LoraConfig
from stages.learner.layout import NATIVE, prepare_load, settle_stage, write_layout

CONFIG = LearnerConfig(lr=1e-4, zero_stage=2)


def test_the_same_ranks_load_what_they_saved(tmp_path: Path) -> None:
    write_layout(tmp_path, CONFIG)

    assert prepare_load(tmp_path, CONFIG) == NATIVE


def test_where_nothing_is_shared_out_any_number_of_ranks_loads_it(tmp_path: Path) -> None:
    write_layout(tmp_path, CONFIG.model_copy(update={"zero_stage": 0, "num_ranks": 4}))

    assert prepare_load(tmp_path, CONFIG.model_copy(update={"zero_stage": 0})) == NATIVE


@pytest.mark.parametrize(
    ("ours", "message"),
    [
        ({"zero_stage": 3}, r"was saved with learner.zero_stage=2, the run has 3; set it back"),
        ({"lora": LoraConfig(rank=4)}, r"was saved with learner.lora=None, the run has \{'rank': 4, .*; set it back"),
    ],
)
def test_another_stage_or_other_adapters_are_refused(tmp_path: Path, ours: dict[str, object], message: str) -> None:
    write_layout(tmp_path, CONFIG)

    with pytest.raises(InputError, match=message):
        prepare_load(tmp_path, CONFIG.model_copy(update=ours))


def test_a_directory_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no learner checkpoint"):
        prepare_load(tmp_path, CONFIG)


@pytest.mark.parametrize(
    ("saved", "ours", "stage"),
    [
        ({}, {}, 0),
        ({"num_ranks": 2}, {}, 2),  # what is in parts is put together by the stage that cut it
        ({}, {"num_ranks": 2}, 0),
        ({"zero_stage": 3, "num_ranks": 2}, {"num_ranks": 4}, 3),
        ({}, {"zero_stage": 2}, 2),  # said by the settings, and refused when it is loaded
        (None, {}, 0),
        (None, {"num_ranks": 2}, 2),
        (None, {"offload_optimizer": "cpu"}, 2),
    ],
)
def test_a_stage_that_is_left_open_is_that_of_the_checkpoint(
    tmp_path: Path, saved: dict[str, object] | None, ours: dict[str, object], stage: int
) -> None:
    if saved is not None:
        config = LearnerConfig.model_validate({"lr": 1e-4} | saved)
        commit_checkpoint(tmp_path, lambda staged: write_layout(staged, config), {})

    assert settle_stage(LearnerConfig.model_validate({"lr": 1e-4} | ours), tmp_path).stage == stage
