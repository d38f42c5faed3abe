from pathlib import Path
from typing import Any

from stages.plan.architecture import Architecture
from stages.plan.batches import plan_run
from stages.plan.disk import count_checkpoint, count_ledger, list_disk
from stages.plan.shapes import Trained
from tests.tiny import tiny_llama
from tests.unit.plan.plans import make_settings

TINY = Architecture(tiny_llama().config, "tiny")


def test_a_checkpoint_has_sixteen_bytes_a_trained_parameter() -> None:
    assert count_checkpoint(Trained(TINY, "all", "x")) == 430_080  # 16 x 26,880
    assert count_checkpoint(Trained(TINY, 1, "x")) == 182_144  # 16 x 9,312, and the tied table, 4 x 8,288
    assert count_checkpoint(Trained(TINY, 1, "x", is_reward=True)) == 149_504  # 16 x 9,344


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

    assert sizes == [418_048, 860_160]  # RL's 2 x 182,144 with the best version, 53,760; SFT's 2 x 430,080


def _layers(num: int) -> dict[str, Any]:
    return {f"{section}__learner__trainable_layers": num for section in ("sft", "reward", "rl")}
