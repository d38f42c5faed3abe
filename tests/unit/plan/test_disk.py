from pathlib import Path
from typing import Any, Literal

import pytest

from stages.data.batches import collate
from stages.data.text import TokenSequence
from stages.learner.config import LearnerConfig
from stages.learner.engine import Learner
from stages.learner.logprobs import compute_logprobs
from stages.models.load import select_trainable
from stages.plan.architecture import Architecture
from stages.plan.batches import plan_run
from stages.plan.disk import count_checkpoint, count_ledger, list_disk
from stages.plan.shapes import Trained
from tests.tiny import tiny_llama
from tests.unit.plan.plans import make_settings

TINY = Architecture(tiny_llama().config, "tiny")


def test_a_checkpoint_has_twelve_bytes_a_trained_parameter_and_shared_out_sixteen() -> None:
    assert count_checkpoint(Trained(TINY, "all", "x"), 0) == 322_560  # 12 x 26,880
    assert count_checkpoint(Trained(TINY, "all", "x"), 2) == 430_080
    assert count_checkpoint(Trained(TINY, 1, "x"), 0) == 111_744  # 12 x 9,312: what is frozen is not in it
    assert count_checkpoint(Trained(TINY, 1, "x", is_reward=True), 0) == 112_128  # 12 x 9,344


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("layers", ["all", 1])
def test_a_real_checkpoint_is_as_large_but_for_its_headers(
    layers: int | Literal["all"], stage: int, tmp_path: Path
) -> None:
    config = LearnerConfig(lr=1e-2, dtype="fp32", schedule="constant", trainable_layers=layers, zero_stage=stage)
    model = tiny_llama()
    select_trainable(model, layers, "sft.learner.trainable_layers")
    learner = Learner(model, config, 1, tmp_path)
    learner.update(
        [collate([TokenSequence((5, 6), (7, 8))])], lambda model, batch: (-compute_logprobs(model, batch).sum(), {})
    )
    (tmp_path / "saved").mkdir()
    learner.save(tmp_path / "saved")

    size = sum(path.stat().st_size for path in (tmp_path / "saved").rglob("*") if path.is_file())

    # 41 KB are DeepSpeed's script that joins shares; what else there is are names and numbers of steps.
    assert 0 < size - count_checkpoint(Trained(TINY, layers, "x"), stage) < 60_000


def test_the_ledger_holds_every_sample_and_what_was_trained_on_it(tmp_path: Path) -> None:
    settings = make_settings(tmp_path)
    run = plan_run(settings.rl, settings.generation)

    # 1,408 samples of 4 x 88 + 20 x 48 + 100 bytes; 22 updates of 32 rows with the reference's 48 log-probabilities
    assert count_ledger(settings, run) == 1_408 * 1_412 + 22 * 32 * (8 * 48 + 100)


def test_kept_versions_and_both_policies_are_models_in_bf16(tmp_path: Path) -> None:
    settings = make_settings(tmp_path, rl__keep_checkpoints="all", **_layers(2))
    run = plan_run(settings.rl, settings.generation)

    items = {item.path: item.num_bytes for item in list_disk(settings, TINY, run)}

    assert items["artifacts/sft"] == 53_760
    assert items["artifacts/reward"] == 53_824
    assert items["artifacts/policy, policy_last"] == 107_520
    assert items["artifacts/checkpoints"] == 107_520  # of updates 11 and 22


def test_two_checkpoints_of_the_largest_stage_lie_in_the_work_directory(tmp_path: Path) -> None:
    equal = make_settings(tmp_path, **_layers(1))
    sft_larger = make_settings(tmp_path, **_layers(1) | {"sft__learner__trainable_layers": "all"})

    sizes = [
        item.num_bytes
        for settings in (equal, sft_larger)
        for item in list_disk(settings, TINY, plan_run(settings.rl, settings.generation))
        if item.is_temporary
    ]

    assert sizes == [277_248, 645_120]  # RL's 2 x 111,744 with the best version, 53,760; SFT's 2 x 322,560


def test_published_versions_are_counted_where_they_have_a_directory_of_their_own(tmp_path: Path) -> None:
    settings = make_settings(tmp_path, rl__generator__weights_dir="shared/weights", rl__max_staleness=4, **_layers(1))

    items = {
        item.path: item.num_bytes for item in list_disk(settings, TINY, plan_run(settings.rl, settings.generation))
    }

    assert items["shared/weights"] == 6 * 2 * 9_312  # with drain: one a step of staleness, the newest and the next


def _layers(num: int) -> dict[str, Any]:
    return {f"{section}__learner__trainable_layers": num for section in ("sft", "reward", "rl")}
