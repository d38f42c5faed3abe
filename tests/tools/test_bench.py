"""Every benchmark script runs at its smallest size, so that none rots."""

import fcntl
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


def run(script: str, *arguments: str, timeout_s: float = 280) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("DVC_STAGE", None)
    done = subprocess.run(
        [sys.executable, f"bench/{script}", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
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


@pytest.fixture(scope="module")
def default_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What default_run.py leaves of one seed: out.json, and a finished pipeline in clones/seed-3."""
    folder = tmp_path_factory.mktemp("default_run")
    model = save_tiny_model(folder / "tiny", head_dim=32)  # the smallest head that vLLM's CPU engine has
    settings = TOY_SETTINGS | {"model.source": {"kind": "path", "path": str(model)}}
    run(
        "default_run.py",
        *("--seeds", "3", "--out", str(folder / "out.json"), "--workspace", str(folder / "clones")),
        *("--set", *(f"{name}={json.dumps(value)}" for name, value in settings.items())),
    )
    return folder


@pytest.fixture(scope="module")
def project(default_run: Path) -> Path:
    """A checkout whose pipeline has finished; nobody changes it."""
    return default_run / "clones/seed-3"


@pytest.mark.timeout(300)
def test_default_run_measures_a_seed_in_a_fresh_clone(default_run: Path) -> None:
    measured = json.loads((default_run / "out.json").read_text())["runs"]["3"]
    assert measured["metrics"]["judge"]["num_prompts"] == 8
    assert measured["stage_s"].keys() >= {"train_sft", "train_policy", "judge_policy"}
    assert measured["memory"]["resident_gib"]["train_policy"] > 0.1
    assert measured["memory"]["total_gib"]["train_policy"] > 0.1


@pytest.fixture(scope="module")
def queue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the queue of algorithms has run one cell: its base in clones/base-*, its report in out.json."""
    directory = tmp_path_factory.mktemp("queue")
    save_tiny_model(directory / "tiny")
    run("algorithms.py", "--modes", "sync", *queue_arguments(directory))
    return directory


def queue_arguments(directory: Path) -> tuple[str, ...]:
    settings = TOY_SETTINGS | {"model.source": {"kind": "path", "path": str(directory / "tiny")}}
    return (
        *("--algorithms", "grpo", "--workspace", str(directory / "clones"), "--out", str(directory / "out.json")),
        *("--set", *(f"{name}={json.dumps(value)}" for name, value in settings.items())),
    )


@pytest.mark.timeout(300)
def test_the_queue_of_algorithms_runs_a_cell_on_what_the_base_made_and_leaves_another_queues_alone(queue: Path) -> None:
    with (queue / "clones/claims/grpo, async 1, seed 0.lock").open("w") as taken:
        fcntl.flock(taken, fcntl.LOCK_EX)
        again = run("algorithms.py", *queue_arguments(queue))

    report = json.loads((queue / "out.json").read_text())
    (cell,) = report["cells"].values()
    assert (cell["algorithm"], cell["mode"], cell["updates"]) == ("grpo", "sync", 4)
    assert cell["learner_peak_gib"] > 0
    assert "unrun: grpo, async 1, seed 0" in again.stdout


@pytest.mark.timeout(300)
def test_updates_of_an_algorithm_are_timed_in_a_short_run_without_evaluation(queue: Path, tmp_path: Path) -> None:
    out = tmp_path / "seconds.json"

    table = run("algorithms.py", *queue_arguments(queue), "--seconds", "--modes", "sync", "--out", str(out)).stdout

    (cell,) = json.loads(out.read_text())["cells"].values()
    assert cell["updates"] == 6
    assert "gold_win_rate" not in cell
    assert 0 < cell["learn_s_of_an_update"] < cell["elapsed_s_of_an_update"]
    assert "| grpo | sync | 1 |" in table


@pytest.mark.timeout(300)
def test_a_study_runs_its_cells_keeps_failures_and_draws_them(queue: Path, tmp_path: Path) -> None:
    out, commit = tmp_path / "out.json", json.loads((queue / "out.json").read_text())["commit"]
    (base,) = (queue / "clones").glob(f"base-{commit[:8]}-????????")
    (tmp_path / find_folder_of_base(commit)).symlink_to(base)  # as if its own settings had made it
    chosen = ("--only", "best_of_n, N 4, seed 0", "best_of_n, N 16, seed 0")
    place = ("--workspace", str(tmp_path), "--out", str(out), "--code", commit)

    shown = run("study.py", "staleness", *place, *chosen)
    run("study.py", "staleness", "--out", str(out), "--figure")

    report = json.loads(out.read_text())
    (cell,) = report["cells"].values()
    assert (cell["algorithm"], cell["N"], cell["updates"]) == ("best_of_n", 4, 4)
    assert 0 < cell["staleness_mean"] <= cell["staleness_max"] <= 3
    assert [point["policy_version"] for point in cell["curve"]] == [0, 2, 4]
    (failure,) = report["failed"].values()
    assert "rl.num_updates=4 is not a multiple of" in failure["reason"]
    assert "unrun: algorithm online_dpo, N 1, seed 0" in shown.stdout
    assert out.with_suffix(".png").stat().st_size > 10_000


def find_folder_of_base(commit: str) -> str:
    """Of the studies with a small policy; by commit and settings."""
    code = "import sys; from cell_queue import Base; from study_grids import BASES; "
    code += "print(Base('base-small', BASES['small'].settings).folder(sys.argv[1]))"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "bench")}
    return subprocess.check_output([sys.executable, "-c", code, commit], env=environment, text=True).strip()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("overlap.py", "--updates", "3"), "--updates 3: allowed: more than the 3 that are not measured"),
        (("study.py", "staleness", "--out", "none.json", "--set", "rl.num_updates"), "allowed: section.key=value"),
        (("study.py", "staleness", "--out", "none.json", "--table"), "none.json: no such file; run the study first"),
        (("algorithms.py", "--workspace", ".", "--out", "none.json", "--table"), "none.json: no such file"),
        (("limits_start.py", "--table"), "no --out: no such file; measure first, without --table"),
        (("all.py", "--out", "none", "--table"), "has no table.md; measure first, without --table"),
        (("mutants.py", "--only", "remix.py"), "invalid choice: 'remix.py'"),
        (("trl_throughput.py", "--completions", "6", "--algorithms", "rloo"), "allowed for rloo: multiples of 4"),
        (("drill.py", "--engine", "transformers", "--only", "server:SIGKILL:any"), "has no such processes"),
    ],
)
def test_a_wrong_option_is_said_in_one_line_before_anything_is_measured(
    tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    command = [sys.executable, str(ROOT / "bench" / arguments[0]), *arguments[1:]]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )

    assert done.returncode != 0
    assert said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_report_goes_on_with_the_same_settings_alone(tmp_path: Path) -> None:
    model, out = save_tiny_model(tmp_path / "tiny"), tmp_path / "throughput.json"
    out.write_text(json.dumps({"target": 1.3, "commit": "another", "arms": {}}))

    done = subprocess.run(
        [sys.executable, "bench/throughput.py", "--model", str(model), "--out", str(out)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert done.returncode == 1
    assert f"{out}: commit is 'another', now" in done.stderr
    assert json.loads(out.read_text())["commit"] == "another"


def test_mutants_of_an_algorithm_are_killed(tmp_path: Path) -> None:
    run("mutants.py", "--only", "best_of_n.py", "--out", str(tmp_path / "out.json"))

    assert [row["kind"] for row in json.loads((tmp_path / "out.json").read_text())] == ["choice", "sign"]


@pytest.mark.timeout(800)
def test_the_crash_drill_finds_a_run_whole_after_three_faults(tmp_path: Path) -> None:
    run(
        "drill.py",
        *("--engine", "transformers", "--faults", "3", "--updates", "60", "--pause-s", "1", "--minutes", "10"),
        *("--only", "learner:SIGKILL:publication", "learner:SIGSTOP:any", "scoring:SIGKILL:any"),
        *("--out", str(tmp_path / "out.json"), "--workspace", str(tmp_path / "runs")),
        timeout_s=700,
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
        *("--algorithms", "ppo", "remax", "online_dpo", "--trainable-layers", "all", "--updates", "2"),
        *("--completions", "2", "--prompt-tokens", "6", "--completion-tokens", "5"),
    )

    report = json.loads((tmp_path / "out.json").read_text())
    ppo, remax = (report["arms"]["all"][name] for name in ("ppo", "remax"))
    assert ppo["bytes"].keys() - remax["bytes"].keys() == {"value model"}
    policy = remax["bytes"]["policy"]
    assert policy["trained_parameters"] == 26_880
    # Besides a few scalars: weights and gradients in float32, two moments of each; a single rank has no second copy.
    sizes = [policy[name] for name in ("weights", "copies", "gradients", "moments")]
    assert sizes == pytest.approx([4 * 26_880, 0, 4 * 26_880, 8 * 26_880], abs=100)
    assert remax["bytes"]["reward model"]["weights"] == pytest.approx(2 * 26_912, abs=100)
    assert ppo["seconds"].keys() - remax["seconds"].keys() == {"values", "learn value"}
    scored = [arm["scored_completions"] for arm in report["arms"]["all"].values()]
    assert scored == [2, 4, 4]  # with the greedy ones; of four samples online DPO trains on two
    assert report["computed_7b"]["paper"] == 0.4607  # (147.02 + 2 * 12.55) / (2 * 147.02 + 2 * 12.55) = 0.5393


def test_what_a_common_trunk_saves_is_measured_in_turns(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path)

    run(
        "trunk.py",
        *("--model", str(inputs.sft), "--reward", str(inputs.reward), "--out", str(tmp_path / "out.json")),
        *("--algorithms", "ppo", "remax", "--trainable-layers", "1", "--rounds", "2", "--completions", "2"),
        *("--prompt-tokens", "6", "--completion-tokens", "5"),
    )

    algorithms = json.loads((tmp_path / "out.json").read_text())["algorithms"]
    assert list(algorithms) == ["ppo", "remax"]
    assert [(found["blocks"], len(found["rounds"])) for found in algorithms.values()] == [(1, 2), (1, 2)]
    assert all(math.isfinite(found["saved"]) and found["saved"] < 1 for found in algorithms.values())


def test_what_settings_of_the_c_libraries_save_is_measured_in_turns(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path)

    run(
        "cpu.py",
        *("--model", str(inputs.sft), "--reward", str(inputs.reward), "--out", str(tmp_path / "out.json")),
        *("--questions", "heap", "waiting, beside other work", "--rounds", "1", "--updates", "1"),
        *("--trainable-layers", "1", "--completions", "4", "--prompt-tokens", "6", "--completion-tokens", "5"),
    )

    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(row["question"], list(row["medians"])) for row in rows] == [
        ("heap", ["kept", "given back"]),
        ("waiting, beside other work", ["soon", "late"]),
    ]
    assert all(found["update_s"] > 0 for row in rows for found in row["medians"].values())


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


def test_throughput_compares_updates_that_agree(tmp_path: Path) -> None:
    model, out = save_tiny_model(tmp_path / "tiny"), tmp_path / "throughput.json"

    run(
        "throughput.py",
        *("--model", str(model), "--prompts", "2", "--rounds", "1", "--arms", "0", "3", "--layers", "1"),
        *("--dtype", "fp32", "--out", str(out)),
    )

    arms = json.loads(out.read_text())["arms"]
    assert arms.keys() == {"rloo, 1 layers, 37 + 24 tokens", "online_dpo, all layers, 37 + 24 tokens"}
    for arm in arms.values():
        ours, plain = arm["first"]["ours"], arm["first"]["plain eager"]
        assert ours == pytest.approx(plain, rel=1e-3)
        assert arm["ratio"] > 0


@pytest.mark.timeout(300)
def test_generation_is_measured_against_the_offline_engine_on_the_same_work(project: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"

    run(
        "limits_generator.py",
        *("--rounds", "1", "--updates", "2", "--prompts", "2", "--samples", "2", "--with-greedy", "--out", str(out)),
        *("--set", "dtype=fp32", "max_prompt_tokens=300", "max_new_tokens=8", "--inputs", str(project / "artifacts")),
    )

    (measured,) = json.loads(out.read_text())["rounds"]
    for arm in ("at once", "window"):
        assert measured[arm]["tokens"]["served"] >= 12  # 2 mini-batches of 2 prompts, each with 3 completions
        assert measured[arm]["same_groups"] >= 0.5  # the two batch differently, and a rounding may turn a draw
        assert measured[arm]["ratio"] > 0
        assert measured[arm]["cpu_ratio"] > 0


@pytest.mark.timeout(300)
def test_a_start_is_timed_until_the_first_work_and_leaves_the_project_as_it_was(project: Path, tmp_path: Path) -> None:
    out, before = tmp_path / "out.json", (project / "dvc.lock").read_text()
    arguments = ("--rounds", "1", "--stages", "train_policy", "--project", str(project), "--out", str(out))

    run("limits_start.py", *arguments)
    table = run("limits_start.py", "--table", "--out", str(out)).stdout

    (measured,) = json.loads(out.read_text())["rounds"]
    assert measured["nothing"].keys() == {"dvc repro", "make run"}
    moments, shares = (measured["stages"]["train_policy"][name] for name in ("moments", "shares"))
    assert moments["first work"] > 0
    assert shares["import torch"] > shares["import json"]
    # What is shared out is all there was, up to the tick in which the process began.
    assert sum(shares.values()) == pytest.approx(max(moments["first work"], moments["learner ready"]), abs=0.5)
    assert "`dvc repro`, nothing to do" in table
    assert (project / "dvc.lock").read_text() == before


@pytest.mark.timeout(300)
def test_seconds_are_measured_against_the_size_of_the_work(project: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"

    run(
        "limits_scaling.py",
        *("--model", str(project / "artifacts/base"), "--rounds", "1", "--engine", "transformers", "--out", str(out)),
        *("--prompts", "1", "2", "--tokens", "4", "--layers", "2"),
    )

    summary = json.loads(out.read_text())["summary"]
    assert summary.keys() == {"learner, prompts", "generator, prompts"}  # what does not change has no slope
    assert [size for size, _ in summary["learner, prompts"]["line"]] == [1, 2]
    assert all(math.isfinite(row["slope"]) for row in summary.values())


@pytest.mark.timeout(300)
def test_overlap_is_measured_in_one_arm(project: Path, tmp_path: Path) -> None:
    tiny = [f"{name}={json.dumps(value)}" for name, value in TOY_SETTINGS.items() if name.startswith("generation.")]
    learner = ("rl.learner.trainable_layers=all", "rl.learner.dtype=fp32", "rl.prompts_per_update=4")
    out, inputs = tmp_path / "out.json", project / "artifacts"

    run(
        "overlap.py",
        *("--rounds", "1", "--updates", "4", "--arms", "async 1, drain", "--inputs", str(inputs), "--out", str(out)),
        *("--set", *tiny, *learner),
    )

    measured = json.loads(out.read_text())["summary"]["async 1, drain"]
    assert measured["wall_s"] >= measured["publish_s"] > 0


@pytest.mark.timeout(300)
def test_one_table_has_every_figure_and_says_what_is_missing(project: Path, tmp_path: Path) -> None:
    arguments = ("--out", str(tmp_path), "--inputs", str(project / "artifacts"), "--only", "limits_run.py", "study.py")

    table = run("all.py", *arguments).stdout
    nothing = subprocess.run(
        [sys.executable, "bench/all.py", "--out", str(tmp_path / "other"), "--inputs", "nowhere", "--only", "ranks.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )

    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    assert [row[-1] for row in rows] == ["`limits_run.py`", "`study.py`"]
    assert rows[0][:2] == ["publish and ledger / wall", "≤ 0.02"]
    assert rows[0][3] in ("yes", "no")
    assert rows[1][3] == "–"
    assert nothing.returncode == 1
    assert "failed: nowhere has no finished pipeline" in nothing.stdout
    saved = json.loads((tmp_path / "table.json").read_text())["scripts"]
    assert saved["limits_run.py"]["state"] == "measured"


def test_the_estimate_of_a_tiny_learner_is_shown_beside_its_peak(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": 259}
    shape = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
    changes = {"rl.algorithm": {"name": "remax"}, "rl.prompts_per_update": 2, "rl.learner.trainable_layers": "all"}
    lengths = {"generation.max_prompt_tokens": 6, "generation.max_new_tokens": 5}
    item = {"name": "tiny", "model": shape | sizes, "changes": changes | lengths}
    (tmp_path / "items.json").write_text(json.dumps([item]))

    done = run("preflight.py", "--configurations", str(tmp_path / "items.json"), "--out", str(tmp_path / "out.json"))

    measured = json.loads((tmp_path / "out.json").read_text())["configurations"]["tiny"]
    assert measured["parameters"] == 35_168  # 2 x 8,288 of two tables, 2 x 9,280 of layers, 32 of the last norm
    assert len(measured["estimated_bytes"]) == len(measured["peak_bytes"]) == 1
    assert measured["peak_bytes"][0] > 0
    assert "| tiny | 0 |" in done.stdout


def test_growth_with_the_vocabulary_counts_what_the_embeddings_need(tmp_path: Path) -> None:
    run(
        "vocabulary.py",
        *("--vocabularies", "300", "1300", "--losses", "chunked", "--trainable-layers", "all", "--layers", "1"),
        *("--rows", "2", "--prompt-tokens", "3", "--completion-tokens", "4", "--out", str(tmp_path / "out.json")),
    )

    arms = json.loads((tmp_path / "out.json").read_text())["arms"]
    small, large = arms["chunked, all, 300"]["own_bytes"], arms["chunked, all, 1300"]["own_bytes"]
    sizes = {name: large[name] - small[name] for name in ("weights", "moments", "copies", "gradients")}
    # 1,000 x 576 numbers of 4 bytes; two moments of each
    assert sizes == pytest.approx({"weights": 2_304_000, "moments": 4_608_000, "copies": 0, "gradients": 2_304_000})
