"""The LLM judge in the pipeline: real dvc and MLflow, an endpoint that always prefers the first."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from stages.data.completion_store import read_completions
from stages.data.store import read_prompts
from stages.judge.alpaca import write_outputs
from tests.hostile_judge import hostile_judge
from tests.integration.conftest import Project

# MLflow's own store calls what SQLAlchemy has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")

KEY = "sk-test-0123456789abcdef-never-written"


def ran_stages(output: str) -> list[str]:
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


def find_files_with(folder: Path, text: str) -> list[Path]:
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [path for path in files if text.encode() in path.read_bytes()]


def write_opponent(project: Project) -> None:
    """Another model's completions, in AlpacaEval's format."""
    prompts = read_prompts(project.path / "artifacts/data", "heldout")
    completions = read_completions(project.path / "artifacts/samples/policy.parquet")
    others = [replace(item, text=f"a {item.sample_index} film") for item in completions]
    write_outputs(project.path / "others.json", prompts, others, generator="other")


def test_the_judge_is_asked_once_and_its_verdicts_reach_mlflow(
    copy_of_finished: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    project = copy_of_finished
    write_opponent(project)  # of toy models, policy and SFT model say the same
    with hostile_judge() as server:
        project.edit({"judge.model": "fake", "judge.base_url": server.url, "judge.against": "others.json"})
        first = project.run("flows.dvc")
        num_calls = server.num_calls
        project.edit({"judge.max_calls": 500})
        again = project.run("flows.dvc")

        assert server.num_calls == num_calls == len(server.asked)

    assert ran_stages(first.stdout) == ran_stages(again.stdout) == ["judge_policy"]
    metrics = json.loads((project.path / "metrics/judge.json").read_text())
    assert (metrics["llm_win_rate"], metrics["llm_position_bias"], metrics["llm_first_share"]) == (0.5, 1.0, 1.0)
    assert (metrics["llm_num_judged"], metrics["llm_num_verdicts"], num_calls) == (8, 16, 16)
    assert metrics["alarm_proxy_without_llm"] is None  # gold and proxy compare with the SFT model, the judge does not
    assert find_files_with(project.path, KEY) == []

    client = MlflowClient(f"sqlite:///{project.path}/mlflow.db")
    (experiment,) = (item for item in client.search_experiments() if item.name == "slipstream")
    (newest, *_) = client.search_runs([experiment.experiment_id], "tags.`slipstream.stage` = 'judge_policy'")
    files = {item.path for item in client.list_artifacts(newest.info.run_id)}
    assert {"verdicts.json", "disagreements.json", "outputs", "samples.json"} <= files
    assert newest.data.metrics["judge/llm_win_rate"] == 0.5
    traces = client.search_traces(locations=[experiment.experiment_id], run_id=newest.info.run_id, max_results=100)
    assert len(traces) == num_calls


def test_kept_versions_are_sampled_once_and_judged_by_todays_settings(
    copy_of_finished: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    project = copy_of_finished
    write_opponent(project)
    rubric = project.path / "stages/judge/prompts/pairwise_review.txt"

    def evaluate() -> tuple[int, dict[str, int]]:
        before = server.num_calls
        project.run("stages.evaluate_checkpoints")
        samples = (project.path / ".slipstream/evaluations").rglob("policy.parquet")
        return server.num_calls - before, {str(path): path.stat().st_mtime_ns for path in samples}

    with hostile_judge() as server:
        project.edit({"judge.model": "fake", "judge.base_url": server.url, "judge.against": "others.json"})
        num_calls, sampled = evaluate()
        assert (num_calls > 0, len(sampled)) == (True, 2)
        project.edit({"judge.max_calls": 500, "judge.total_timeout_s": 100, "judge.num_shown": 1})
        assert evaluate() == (0, sampled)  # a limit is raised
        rubric.write_text(rubric.read_text().replace("version 1", "version 2"))
        assert evaluate() == (num_calls, sampled)  # another rubric asks, and pays, again
        project.edit({"judge.max_calls": 3 * num_calls - 1})
        rubric.write_text(rubric.read_text().replace("version 2", "version 3"))
        over = project.run("stages.evaluate_checkpoints", check=False)
        assert (over.returncode, "judge.max_calls" in over.stderr) == (1, True)  # one budget for all versions

    client = MlflowClient(f"sqlite:///{project.path}/mlflow.db")
    (experiment,) = (item for item in client.search_experiments() if item.name == "slipstream")
    (judged,) = client.search_runs([experiment.experiment_id], "tags.`slipstream.stage` = 'judge_policy'")
    curves = client.search_runs([experiment.experiment_id], "tags.`slipstream.stage` = 'evaluate_checkpoints'")
    parents = {run.data.tags["mlflow.parentRunId"] for run in [judged, *curves]}
    assert parents == {judged.data.tags["mlflow.parentRunId"]}
    history = client.get_metric_history(curves[-1].info.run_id, "checkpoint/llm_win_rate")
    assert [point.step for point in history] == [2, 4]
    assert {"checkpoint/kl_nats", "checkpoint/alarm_length"} <= curves[-1].data.metrics.keys()


def test_a_missing_key_is_found_before_anything_runs(
    copy_of_finished: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    copy_of_finished.edit({"judge.model": "gpt-4o"})

    done = copy_of_finished.run("stages.check_params", check=False)

    assert done.returncode == 2
    assert "OPENAI_API_KEY is not set: judge.base_url=https://api.openai.com/v1 wants a key" in done.stderr
