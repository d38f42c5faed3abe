from pathlib import Path
from typing import Any

import pytest

from stages.common.errors import SettingError
from stages.plan.architecture import Architecture, find_known
from stages.plan.batches import plan_run
from stages.plan.devices import GIB, Devices, parse_devices
from stages.plan.processes import Models, Process, count_shards, find_utilization, list_processes, sum_loads
from tests.unit.plan.plans import make_settings

POLICY = find_known("HuggingFaceTB/SmolLM2-135M")
CPU = Devices(False, (0, 1), 24 * GIB)


def plan(tmp_path: Path, devices: Devices, gold: Architecture | None = None, **changes: Any) -> list[Process]:
    assert POLICY is not None
    settings = make_settings(tmp_path, **changes)
    run = plan_run(settings.rl, settings.generation)
    return list_processes(settings, Models(POLICY, gold), run.update, devices)


def of_stage(processes: list[Process], stage: str) -> list[tuple[str, str]]:
    return [(item.name, item.device) for item in processes if item.stage == stage]


def test_on_cpu_everything_takes_from_one_memory(tmp_path: Path) -> None:
    processes = plan(tmp_path, CPU)

    assert of_stage(processes, "train_policy") == [
        ("policy + reference", "memory"),
        ("generator", "memory"),
        ("scoring", "memory"),
    ]
    (load,) = [item for item in sum_loads(processes) if item.stage == "train_policy"]
    assert load.needs == sum(item.needs for item in processes if item.stage == "train_policy")


def test_apart_the_learner_has_its_own_gpu_and_the_reward_model_is_with_the_generator(tmp_path: Path) -> None:
    assert of_stage(plan(tmp_path, parse_devices("2x80")), "train_policy") == [
        ("policy + reference", "GPU 1"),
        ("generator", "GPU 0"),
        ("scoring", "GPU 0"),
    ]


def test_with_servers_elsewhere_the_reward_model_is_with_the_learner(tmp_path: Path) -> None:
    servers = {"replicas": 0, "urls": ["http://10.0.0.2:8000"], "weights_dir": "/shared/weights"}
    changes = {"rl__generator": servers, "rl__learner_devices": "2,3"}

    assert of_stage(plan(tmp_path, parse_devices("4x80"), **changes), "train_policy") == [
        ("policy + reference", "GPU 2"),
        ("scoring", "GPU 2"),
    ]


def test_versions_that_wait_for_servers_are_on_the_learners_gpu(tmp_path: Path) -> None:
    of_files, of_nccl = (plan(tmp_path, parse_devices("2x80"), rl__publish=publish) for publish in ("files", "nccl"))

    learners = [next(item for item in found if item.device == "GPU 1") for found in (of_files, of_nccl)]
    # Three of the top 12 layers and the last norm, in bf16: 3 x 2 x (12 x 3,540,096 + 576)
    assert learners[1].parts.weights - learners[0].parts.weights == 3 * 84_963_456


def test_in_turns_everyone_is_on_the_first_gpu(tmp_path: Path) -> None:
    processes = plan(tmp_path, parse_devices("2x80"), rl__max_staleness=0)

    assert {device for _, device in of_stage(processes, "train_policy")} == {"GPU 0"}
    # vLLM takes 0.92 of it whatever it needs, so the others find no room
    assert max(load.needs for load in sum_loads(processes)) > 74 * GIB


def test_ppo_holds_a_value_model_and_one_process_its_larger_gradients(tmp_path: Path) -> None:
    changes = {"rl__algorithm": {"name": "ppo"}, "rl__score_on": "learner"}
    (learner, *_) = [item for item in plan(tmp_path, CPU, **changes) if item.stage == "train_policy"]

    assert learner.name == "policy + reference + value + reward"
    # Three models in float32 and one in bf16, of 134.5M parameters; the reference's linear layers are in bf16 too, and
    # its head of 49,152 x 576 is there twice
    assert learner.parts.weights == pytest.approx(14 * 134.515e6 - 2 * 106.168e6 + 2 * 28.312e6, rel=1e-4)
    assert learner.parts.gradients == pytest.approx(4 * 42.482e6, rel=1e-4)


def test_offline_nothing_is_sampled_in_rl(tmp_path: Path) -> None:
    changes = {"rl__algorithm": {"name": "dpo"}}

    assert of_stage(plan(tmp_path, CPU, **changes), "train_policy") == [("policy + reference", "memory")]


def test_a_rule_needs_no_reward_model(tmp_path: Path) -> None:
    task = {"name": "problems", "source": "inputs/data/a.jsonl"}
    processes = plan(tmp_path, CPU, data__task=task)

    assert {item.stage for item in processes} == {"train_sft", "label_pairs", "train_policy", "sample_policy"}
    assert of_stage(processes, "train_policy") == [("policy + reference", "memory"), ("generator", "memory")]


def test_a_gold_model_is_held_where_it_labels_and_judges(tmp_path: Path) -> None:
    task = {"name": "pairs", "source": "a.jsonl", "gold": {"name": "model", "path": "inputs/model/gold"}}
    processes = plan(tmp_path, CPU, gold=POLICY, data__task=task)

    assert ("gold model", "memory") in of_stage(processes, "label_pairs")
    (judge,) = [item for item in processes if item.stage == "judge_policy"]
    assert judge.parts.weights == pytest.approx(
        (2 + 4) * 134.5e6, rel=1e-3
    )  # gold in bf16, reward model as judge.dtype


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [((), 0.92), (("--gpu-memory-utilization=0.5",), 0.5), (("--gpu_memory_utilization", "0.4", "-x"), 0.4)],
)
def test_vllm_takes_the_share_it_is_given(arguments: tuple[str, ...], expected: float) -> None:
    assert find_utilization(arguments) == expected


def test_a_server_is_cut_over_its_gpus_and_needs_as_many(tmp_path: Path) -> None:
    assert count_shards(("--tensor_parallel_size=2",)) == 2
    arguments = ["--tensor-parallel-size=2"]

    processes = plan(tmp_path, parse_devices("4x80"), generation__engine_args=arguments)

    assert of_stage(processes, "train_policy")[1:3] == [("generator", "GPU 0"), ("generator", "GPU 1")]
    with pytest.raises(SettingError, match=r"--tensor-parallel-size=2, but generator of train_policy has 1 GPUs"):
        plan(tmp_path, parse_devices("2x80"), generation__engine_args=arguments)


@pytest.mark.parametrize("value", ["0", "1.5", "much"])
def test_a_wrong_share_is_refused(value: str) -> None:
    with pytest.raises(SettingError, match=rf"--gpu-memory-utilization={value}: allowed: above 0, at most 1"):
        find_utilization((f"--gpu-memory-utilization={value}",))


@pytest.mark.parametrize("text", ["8", "0x80", "8x", "8x80GiB", "cpu:0-1"])
def test_a_wrong_description_of_devices_is_refused(text: str) -> None:
    with pytest.raises(SettingError, match=r"expected the number of GPUs and the GiB of each, such as 8x80"):
        parse_devices(text)


def test_each_rank_has_a_gpu_and_the_first_one_the_reward_model(tmp_path: Path) -> None:
    changes = {"rl__learner__num_ranks": 2, "rl__learner__lora": {"rank": 16}, "rl__score_on": "learner"}
    processes = plan(tmp_path, parse_devices("4x80"), **changes)
    first, second, *_ = [item for item in processes if item.stage == "train_policy"]

    assert (first.name, first.device) == ("policy + reward, rank 0", "GPU 2")
    assert (second.name, second.device) == ("policy + reward, rank 1", "GPU 3")
    # The reward model in bf16; no reference, as adapters can be switched off
    assert first.parts.weights - second.parts.weights == pytest.approx(2 * 134.516e6, rel=1e-4)
