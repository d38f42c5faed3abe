"""The whole pipeline on a two-layer model: real dvc, real DeepSpeed, real MLflow on sqlite."""

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.integration.conftest import TIMEOUT_S, Project
from tests.processes import watched


def ran_stages(output: str) -> list[str]:
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


def hash_weights(directory: Path) -> str:
    return hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()


def test_every_stage_leaves_its_artifacts_and_metrics(finished: Project) -> None:
    metrics = {path.stem: json.loads(path.read_text()) for path in (finished.path / "metrics").glob("*.json")}

    assert {"eval_loss_before", "eval_loss", "perplexity"} <= metrics["sft"].keys()
    assert metrics["sft"]["eval_loss"] < metrics["sft"]["eval_loss_before"]
    assert {"accuracy", "accuracy_interval", "num_pairs"} <= metrics["reward"].keys()
    assert {"updates", "samples_total", "score_first", "score_last", "kl_nats", "wall_s"} <= metrics["policy"].keys()
    assert metrics["policy"]["updates"] == 4
    # 4 prompts x 4 samples a rollout; rollouts with equal scores everywhere give no update and are drawn again.
    assert metrics["policy"]["samples_total"] % 16 == 0
    assert metrics["policy"]["samples_total"] >= 4 * 16
    assert {
        "gold_win_rate",
        "gold_win_rate_interval",
        "gold_mean_sft",
        "gold_mean_policy",
        "second_mean_sft",
        "second_mean_policy",
        "kl_nats",
        "length_ratio",
        "num_prompts",
    } <= metrics["judge"].keys()
    assert "| " in (finished.path / "artifacts/samples.md").read_text()
    kept = {path.name for path in (finished.path / "artifacts/checkpoints").iterdir()}
    assert kept == {"0002", "0004", "index.json"}
    for name in ("sft", "reward", "policy"):
        assert (finished.path / f"plots/{name}.csv").read_text().startswith("step,")


def test_artifacts_load_with_the_library_alone(finished: Project) -> None:
    artifacts = finished.path / "artifacts"

    for name in ("base", "sft", "policy", "policy_last", "checkpoints/0002"):
        AutoModelForCausalLM.from_pretrained(artifacts / name)
        assert AutoTokenizer.from_pretrained(artifacts / name).chat_template
    assert AutoModelForSequenceClassification.from_pretrained(artifacts / "reward").config.num_labels == 1


def test_a_second_run_has_nothing_to_do(finished: Project) -> None:
    assert ran_stages(finished.run("flows.dvc").stdout) == []


def test_one_changed_rl_setting_reruns_rl_and_what_follows(copy_of_finished: Project) -> None:
    copy_of_finished.edit({"rl.algorithm": {"name": "remax", "kl_coef": 0.05, "kl_mode": "full_step"}})

    output = copy_of_finished.run("flows.dvc").stdout

    assert ran_stages(output)[0] == "train_policy"
    assert set(ran_stages(output)) <= {"train_policy", "sample_policy", "judge_policy"}
    assert (
        json.loads((copy_of_finished.path / "metrics/policy.json").read_text())["samples_total"] == 4 * 4 * 2
    )  # one sample and one greedy


def test_the_name_alone_turns_rl_into_offline_dpo(copy_of_finished: Project) -> None:
    copy_of_finished.edit({"rl.algorithm.name": "dpo"})

    done = copy_of_finished.run("flows.dvc")

    assert ran_stages(done.stdout) == ["train_policy", "sample_policy", "judge_policy"]
    metrics = json.loads((copy_of_finished.path / "metrics/policy.json").read_text())
    assert metrics["samples_total"] == 0
    assert metrics["validation_loss_best"] <= metrics["validation_loss_first"]
    checked = copy_of_finished.run("stages.rl.ledger", "check", "artifacts/ledger").stdout
    assert checked == (
        f"offline: 4 updates of dpo on {metrics['num_pairs']} labelled pairs; the run was offline, nothing was "
        "sampled: ok\n"
    )
    assert "loss on validation pairs" in copy_of_finished.run("stages.report").stdout
    assert (copy_of_finished.path / "plots/policy.csv").read_text().startswith("step,")
    assert ran_stages(copy_of_finished.run("flows.dvc").stdout) == []


def test_mlflow_has_one_parent_with_a_child_for_every_stage(finished: Project) -> None:
    script = (
        "import mlflow; mlflow.set_tracking_uri('sqlite:///mlflow.db')\n"
        "runs = mlflow.search_runs(search_all_experiments=True, output_format='list')\n"
        "parents = [r for r in runs if 'mlflow.parentRunId' not in r.data.tags]\n"
        "children = [r for r in runs if r.data.tags.get('mlflow.parentRunId') == parents[0].info.run_id]\n"
        "print(len(parents), len(children), sorted({r.info.status for r in runs}))\n"
        "rl = next(r for r in children if 'train_policy' in r.info.run_name)\n"
        "print(rl.data.params['rl.algorithm.name'], len(rl.inputs.dataset_inputs), 'reward/score' in rl.data.metrics)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=finished.path,
        env=finished.environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )

    assert done.stdout.splitlines()[:1] == ["1 8 ['FINISHED']"], done.stdout + done.stderr
    assert done.stdout.splitlines()[1] == "online_dpo 5 True"  # data, SFT model, pairs, reward model, inputs/ledger


@pytest.mark.parametrize(("stage", "artifact"), [("train_sft", "sft"), ("train_policy", "policy_last")])
def test_a_stage_killed_half_way_resumes_to_the_very_same_weights(
    stage: str, artifact: str, copy_of_finished: Project
) -> None:
    expected = hash_weights(copy_of_finished.path / "artifacts" / artifact)
    checkpoint = copy_of_finished.path / ".slipstream/work" / stage

    with watched(
        [sys.executable, "-m", f"stages.{stage}"],
        cwd=copy_of_finished.path,
        env=copy_of_finished.environment,
        timeout_s=120,
        stderr=subprocess.DEVNULL,
    ) as started:
        while not any(checkpoint.glob("*/checkpoint/complete")):
            assert started.poll() is None, "the stage ended, or was ended for its silence, before it could be killed"
            time.sleep(0.01)
    assert hash_weights(copy_of_finished.path / "artifacts" / artifact) == expected  # the earlier artifact is whole

    output = copy_of_finished.run(f"stages.{stage}").stderr

    assert "resumed" in output
    assert hash_weights(copy_of_finished.path / "artifacts" / artifact) == expected


def test_a_mistyped_setting_is_one_line_and_exit_code_2(copy_of_finished: Project) -> None:
    copy_of_finished.edit({"rl.num_update": 3})

    done = copy_of_finished.run("stages.train_policy", check=False)

    assert done.returncode == 2
    assert done.stderr.startswith("rl.num_update: unknown setting; settings are algorithm, learner, num_updates")
    assert "Traceback" not in done.stderr


def test_a_model_directory_without_weights_leaves_earlier_artifacts_alone(copy_of_finished: Project) -> None:
    before = hash_weights(copy_of_finished.path / "artifacts/base")
    (copy_of_finished.path / "tiny/model.safetensors").unlink()

    done = copy_of_finished.run("stages.prepare_model", check=False)

    assert done.returncode == 2
    assert "tiny: holds no weights (*.safetensors)" in done.stderr
    assert "Traceback" not in done.stderr
    assert hash_weights(copy_of_finished.path / "artifacts/base") == before


def test_a_full_disk_is_one_line_and_leaves_earlier_artifacts_alone(copy_of_finished: Project) -> None:
    before = hash_weights(copy_of_finished.path / "artifacts/sft")
    copy_of_finished.edit({"sft.seed": 5})

    done = subprocess.run(
        # 64 blocks of 1,024 bytes: enough for the log, not for weights.
        ["bash", "-c", f"ulimit -f 64; exec {sys.executable} -m stages.train_sft"],
        cwd=copy_of_finished.path,
        env=copy_of_finished.environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )

    assert done.returncode == 1
    assert "no space left: " in done.stderr
    assert "Traceback" not in done.stderr
    assert hash_weights(copy_of_finished.path / "artifacts/sft") == before
