"""Every benchmark script runs at its smallest size, so that none rots."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.conftest import ROOT, TOY_SETTINGS
from tests.tiny import save_tiny_model
from tests.tiny_rl import make_inputs


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("DVC_STAGE", None)
    done = subprocess.run(
        [sys.executable, f"bench/{script}", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done


def test_trl_agreement_records_our_half(tmp_path: Path) -> None:
    directory = tmp_path / "recorded"

    run("trl_agreement.py", "record", str(directory))

    recorded = json.loads((directory / "ours.json").read_text())["rl"]
    results, rows = recorded["results"], recorded["rows"]
    assert results.keys() >= {"rloo", "proximal_rloo", "grpo", "dr_grpo", "online_dpo", "ppo", "ppo_as_trl_value"}
    assert all((directory / f"{key}.safetensors").exists() for key in ("sft", "reward", *results))
    assert all(math.isfinite(result["loss"]) and result["num_micro_batches"] > 1 for result in results.values())
    assert len({len(row["token_ids"]) for row in rows}) > 3
    assert {row["is_finished"] for row in rows} == {True, False}


def test_throughput_beside_trl_runs_our_arm_and_says_what_it_skips(tmp_path: Path) -> None:
    inputs, out = make_inputs(tmp_path), tmp_path / "out.json"
    arguments = ("--smallest", "--inputs", str(inputs.data.parent), "--out", str(out))

    first = run("trl_throughput.py", *arguments, "--rounds", "1", "--algorithms", "rloo")
    again = run("trl_throughput.py", *arguments, "--rounds", "1", "--algorithms", "rloo")

    (arms,) = json.loads(out.read_text())["rounds"]
    measured = arms["all/rloo/transformers"]
    assert measured["samples_per_s"] == pytest.approx(4 / measured["wall_s"])
    assert 0 < measured["mean_tokens"] <= 6
    assert "skipped: TRL's arms" in first.stderr
    assert "| all | rloo | ours, `transformers` |" in again.stdout
    assert "all/rloo/transformers" not in again.stderr  # it was not run again


@pytest.mark.timeout(300)
def test_default_run_measures_a_seed_in_a_fresh_clone(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "tiny")
    settings = TOY_SETTINGS | {"model.source": {"kind": "path", "path": str(model)}}

    run(
        "default_run.py",
        *("--seeds", "3", "--out", str(tmp_path / "out.json"), "--workspace", str(tmp_path / "clones")),
        *("--set", *(f"{name}={json.dumps(value)}" for name, value in settings.items())),
    )

    measured = json.loads((tmp_path / "out.json").read_text())["runs"]["3"]
    assert measured["metrics"]["judge"]["num_prompts"] == 8
    assert measured["stage_s"].keys() >= {"train_sft", "train_policy", "judge_policy"}


@pytest.mark.timeout(300)
def test_the_queue_of_algorithms_runs_a_cell_on_what_the_base_made_and_goes_on(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "tiny")
    settings = TOY_SETTINGS | {"model.source": {"kind": "path", "path": str(model)}}
    arguments = (
        *("--algorithms", "grpo", "--workspace", str(tmp_path / "clones"), "--out", str(tmp_path / "out.json")),
        *("--set", *(f"{name}={json.dumps(value)}" for name, value in settings.items())),
    )

    run("algorithms.py", "--modes", "sync", *arguments)
    again = run("algorithms.py", "--hours", "0", *arguments)

    report = json.loads((tmp_path / "out.json").read_text())
    (cell,) = report["cells"].values()
    assert (cell["algorithm"], cell["mode"], cell["updates"]) == ("grpo", "sync", 4)
    assert cell["learner_peak_gib"] > 0
    assert "unrun: grpo, async 1, seed 0" in again.stdout


def test_mutants_of_an_algorithm_are_killed(tmp_path: Path) -> None:
    run("mutants.py", "--only", "best_of_n.py", "--out", str(tmp_path / "out.json"))

    assert [row["kind"] for row in json.loads((tmp_path / "out.json").read_text())] == ["choice", "sign"]


def test_the_crash_drill_finds_a_run_whole_after_three_faults(tmp_path: Path) -> None:
    run(
        "drill.py",
        *("--engine", "transformers", "--faults", "3", "--updates", "60", "--pause-s", "1", "--minutes", "4"),
        *("--only", "learner:SIGKILL:publication", "learner:SIGSTOP:any", "scoring:SIGKILL:any"),
        *("--out", str(tmp_path / "out.json"), "--workspace", str(tmp_path / "runs")),
    )

    report = json.loads((tmp_path / "out.json").read_text())
    assert sorted((fault["target"], fault["signal"]) for fault in report["faults"]) == [
        ("learner", "SIGKILL"),
        ("learner", "SIGSTOP"),
        ("scoring", "SIGKILL"),
    ]
    assert all(fault["noticed"] and fault["recovered_s"] for fault in report["faults"])
    assert set(report["totals"]["must be 0"].values()) == {0}
    assert report["totals"]["counts"]["updates"] == 60 * len(report["campaigns"])


def test_the_bytes_of_a_tiny_model_are_those_of_its_types(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path)

    run(
        "memory.py",
        *("--model", str(inputs.sft), "--reward", str(inputs.reward), "--out", str(tmp_path / "out.json")),
        *("--algorithms", "ppo", "remax", "--trainable-layers", "all", "--updates", "2"),
        *("--completions", "2", "--prompt-tokens", "6", "--completion-tokens", "5"),
    )

    report = json.loads((tmp_path / "out.json").read_text())
    ppo, remax = (report["arms"]["all"][name] for name in ("ppo", "remax"))
    assert ppo["bytes"].keys() - remax["bytes"].keys() == {"value model"}
    policy = remax["bytes"]["policy"]
    assert policy["trained_parameters"] == 26_880
    # Besides a few scalars: weights, master weights and gradients in float32, two moments of each.
    sizes = [policy[name] for name in ("weights", "copies", "gradients", "moments")]
    assert sizes == pytest.approx([4 * 26_880, 4 * 26_880, 4 * 26_880, 8 * 26_880], abs=100)
    assert remax["bytes"]["reward model"]["weights"] == pytest.approx(2 * 26_912, abs=100)
    assert ppo["seconds"].keys() - remax["seconds"].keys() == {"values", "learn value"}
    assert (ppo["scored_completions"], remax["scored_completions"]) == (2, 4)
    assert report["computed_7b"]["paper"] == 0.4607  # (147.02 + 2 * 12.55) / (2 * 147.02 + 2 * 12.55) = 0.5393


def test_the_speed_of_the_judge_is_measured_with_an_empty_and_a_full_store(tmp_path: Path) -> None:
    run(
        "judge_throughput.py",
        *("--matches", "8", "--concurrency", "2", "4", "--latency-s", "0.02"),
        *("--workspace", str(tmp_path), "--out", str(tmp_path / "out.json")),
    )

    arms = json.loads((tmp_path / "out.json").read_text())["arms"]
    assert [(arm["concurrency"], arm["verdicts"], arm["calls"], arm["stored_verdicts"]) for arm in arms] == [
        (2, 16, 16, 16),
        (4, 16, 16, 16),
    ]
    assert [arm["ideal_s"] for arm in arms] == pytest.approx([0.16, 0.08])  # 16 calls * 0.02 s / 2 and 4


def test_judge_traces_are_measured_in_both_stores(tmp_path: Path) -> None:
    run("judge_traces.py", "--num-traces", "5", "--out", str(tmp_path / "out.json"))

    measured = json.loads((tmp_path / "out.json").read_text())
    assert measured["num_traces"] == 5
    assert all(rates["first"] > 0 and rates["again"] > 0 for rates in measured["traces_per_s"].values())
    assert measured["traces_per_s"].keys() == {"sqlite", "server"}


@pytest.mark.parametrize(
    ("script", "arms"),
    [
        ("learner_throughput", {"torch bf16", "torch fp32", "learner bf16", "lora"}),
        ("remax_vs_ppo_memory", {"remax", "ppo"}),
        ("weight_transfer", {"files", "broadcast", "shared memory"}),
        ("async_overlap", {"cpu"}),
    ],
)
def test_benchmarks_for_gpus_run_where_there_is_none(tmp_path: Path, script: str, arms: set[str]) -> None:
    run(f"gpu/{script}.py", "--device", "cpu", "--smallest", "--out", str(tmp_path / "out.json"))

    report = json.loads((tmp_path / "out.json").read_text())
    assert report["machine"]["device"] == "cpu"
    assert report["arms"].keys() == arms
    numbers = [value for arm in report["arms"].values() for value in arm.values() if isinstance(value, float)]
    assert all(math.isfinite(value) for value in numbers)
    assert [arm.get("largest_gap", 0.0) for arm in report["arms"].values()] == [0.0] * len(arms)


def test_ranks_say_what_they_hold(tmp_path: Path) -> None:
    model, out = save_tiny_model(tmp_path / "tiny"), tmp_path / "ranks.json"

    run("ranks.py", "--model", str(model), "--arms", "2", "--updates", "1", "--out", str(out))

    alone, two = json.loads(out.read_text())["arms"]
    assert (len(alone["held_bytes"]), len(two["held_bytes"])) == (1, 2)
    assert alone["parameters"] == two["parameters"] > 20_000
    assert two["update_s"] > 0
