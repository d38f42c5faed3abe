"""Real MLflow on SQLite, a real DVC repository, toy stages named as ours."""

import shutil
from pathlib import Path

import pytest
import yaml

from stages.common.errors import InputError
from stages.common.process import free_port
from stages.lineage.find import find_lineage
from stages.lineage.page import render_lineage, render_readers
from stages.lineage.readers import find_readers
from tests.tools.toy_pipeline import STAGES, change, connect_toy, find_parents, make_toy, run_module

pytestmark = pytest.mark.filterwarnings(
    # MLflow 3.17 declares its own tables this way; SQLAlchemy 2.1 deprecates it.
    "ignore:The ``noload`` loader strategy is deprecated",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Path:
    """A repository whose pipeline ran once. Tests that change it work on a copy."""
    path = make_toy(tmp_path_factory.mktemp("toy"), empty_store)
    run_module(path, "flows.dvc")
    run_module(path, "stages.send_events", "--seconds", "200")  # what a slow machine had no time for
    return path


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "copy", symlinks=True)


def read_outs(path: Path) -> dict[str, dict[str, str]]:
    stages = yaml.safe_load((path / "dvc.lock").read_text())["stages"]
    return {stage: {out["path"]: out["md5"] for out in entry["outs"]} for stage, entry in stages.items()}


def read_stage_tags(tags: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in tags.items() if name.startswith("stage.")}


def test_a_run_has_the_hashes_of_what_it_made_and_the_printout_has_them_all(finished: Path) -> None:
    (parent,) = find_parents(finished)
    client = connect_toy(finished)
    page = run_module(finished, "stages.lineage").stdout

    assert parent.info.status == "FINISHED"
    assert parent.data.metrics == {"judge/gold_win_rate": 0.75, "judge/kl_nats": 2.5}
    assert sorted(read_outs(finished)) == sorted(STAGES)
    for stage, outs in read_outs(finished).items():
        run = client.get_run(parent.data.tags[f"stage.{stage}"])
        assert {path: run.data.tags[f"dvc.out.{path}"] for path in outs} == outs
        assert run.info.run_id in page
        assert [md5 for md5 in outs.values() if md5 not in page] == []
    assert "rl.algorithm.name = remax" in page
    assert "judge/gold_win_rate = 0.75" in page
    assert "not in the cache" not in page


def test_a_policy_is_found_by_what_the_judge_said_and_is_one_model_however_often_it_is_sent(copy: Path) -> None:
    for sent in copy.glob(".slipstream/tracking/*/*.sent.json"):
        sent.unlink()  # as if killed before the offsets were noted down
    run_module(copy, "stages.link_runs")

    (parent,) = find_parents(copy)
    client = connect_toy(copy)
    models = client.search_logged_models([parent.info.experiment_id])
    assert sorted(model.name for model in models) == ["policy", "sft"]
    (policy,) = client.search_logged_models([parent.info.experiment_id], "metrics.gold_win_rate > 0.5")
    assert policy.source_run_id == parent.data.tags["stage.train_policy"]
    assert policy.tags["dvc.md5"] == read_outs(copy)["train_policy"]["artifacts/policy"]
    assert policy.tags["slipstream.pipeline"] == parent.data.tags["slipstream.pipeline"]
    assert {metric.key: metric.value for metric in policy.metrics} == {"gold_win_rate": 0.75, "kl_nats": 2.5}
    assert client.search_logged_models([parent.info.experiment_id], "metrics.gold_win_rate > 0.8") == []


def test_what_a_pipeline_skips_or_restores_leads_to_the_runs_that_made_it(copy: Path) -> None:
    (first,) = find_parents(copy)
    change(copy, "remax}, seed: 0", "remax}, seed: 1")
    run_module(copy, "flows.dvc")
    second = find_parents(copy)[0]

    old, new = read_stage_tags(first.data.tags), read_stage_tags(second.data.tags)
    assert {name for name in old if old[name] == new[name]} == {"stage.prepare_data", "stage.train_sft"}
    assert sorted(new) == sorted(old)

    change(copy, "remax}, seed: 1", "remax}, seed: 0")
    assert "Running stage" not in run_module(copy, "flows.dvc").stdout

    third = find_parents(copy)[0]
    assert len(find_parents(copy)) == 3
    assert read_stage_tags(third.data.tags) == old
    assert third.info.status == "FINISHED"
    assert third.data.params["rl.seed"] == "0"
    assert third.data.metrics == {"judge/gold_win_rate": 0.75, "judge/kl_nats": 2.5}


def test_a_pipeline_named_from_outside_that_runs_nothing_has_every_part_linked(copy: Path) -> None:
    (first,) = find_parents(copy)

    for _ in range(2):
        run_module(copy, "stages.link_runs", SLIPSTREAM_PIPELINE="nightly", SLIPSTREAM_RECIPE="ppo")

    second = next(run for run in find_parents(copy) if run.data.tags["slipstream.pipeline"] == "nightly")
    assert len(find_parents(copy)) == 2
    assert read_stage_tags(second.data.tags) == read_stage_tags(first.data.tags)
    assert second.data.tags["slipstream.recipe"] == "ppo"
    assert "taken over" in run_module(copy, "stages.lineage", "nightly").stdout


def test_a_model_is_found_by_alias_by_version_and_by_run(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy)
    (parent,) = find_parents(copy)
    client = connect_toy(copy)
    run_id = parent.data.tags["stage.train_policy"]
    client.create_registered_model("slipstream-policy")
    client.create_model_version("slipstream-policy", source=f"runs:/{run_id}/policy", run_id=run_id)
    client.set_registered_model_alias("slipstream-policy", "champion", "1")

    names = ("champion", "slipstream-policy/1", run_id, parent.info.run_id)
    pages = [render_lineage(find_lineage(client, name)).split("\n", 1) for name in names]

    assert pages[0][0] == "slipstream-policy version 1 (champion)"
    assert len({page for _, page in pages}) == 1
    with pytest.raises(InputError, match=r"^MODEL=challenger: "):
        find_lineage(client, "challenger")
    with pytest.raises(InputError, match="has no such run"):
        find_lineage(client, "0" * 32)


def test_a_search_by_data_finds_exactly_the_runs_that_read_it(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished)
    (parent,) = find_parents(finished)
    client = connect_toy(finished)
    digest = read_outs(finished)["train_sft"]["artifacts/sft"]
    expected = {parent.data.tags[f"stage.{stage}"] for stage in ("train_policy", "sample_policy")}

    for data in ("artifacts/sft", digest, digest[:8]):
        readers = find_readers(client, data)
        assert {(reader.run.info.run_id, reader.md5) for reader in readers} == {(run, digest) for run in expected}
    page = run_module(finished, "stages.lineage", "--data", "inputs/rows.csv").stdout.splitlines()[1:]
    assert [line.split()[1] for line in page] == ["prepare_data"]
    assert "no run is known" in render_readers("00000000", find_readers(client, "00000000"))
    with pytest.raises(InputError, match=r"dvc\.lock has it as a part of artifacts/sft"):
        find_readers(client, "artifacts/sft/content.txt")


def test_a_file_missing_from_the_cache_is_named(copy: Path) -> None:
    md5 = read_outs(copy)["train_policy"]["artifacts/policy"]
    (copy / ".dvc/cache/files/md5" / md5[:2] / md5[2:]).unlink()

    assert f"{md5}  not in the cache" in run_module(copy, "stages.lineage").stdout


def test_without_a_server_there_is_one_line(finished: Path) -> None:
    port = free_port()
    done = run_module(finished, "stages.lineage", check=False, MLFLOW_TRACKING_URI=f"http://me:secret@127.0.0.1:{port}")

    assert done.returncode == 1
    assert done.stderr.startswith(f"MLflow at http://127.0.0.1:{port} gives no answer")
    assert done.stderr.count("\n") == 1
    assert "secret" not in done.stderr
