import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from flows.parameters import STAGES, Placement, RunParameters, apply_settings, list_needed
from flows.sweep import SweepParameters, describe_point, list_points, list_shared
from stages.common.config import read_params
from stages.common.errors import SettingError
from stages.common.pipeline import read_stage, read_yaml

ROOT = Path(__file__).parents[3]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    return tmp_path


def test_the_flow_has_a_task_for_every_stage_of_dvc_in_an_order_in_which_they_can_run() -> None:
    assert set(STAGES) == set(read_yaml(ROOT / "dvc.yaml")["stages"])
    made: set[str] = set()
    for stage in STAGES:
        entry = read_stage(stage, ROOT / "dvc.yaml")
        assert {dep for dep in entry.deps if dep.startswith("artifacts/")} <= made
        made.update(entry.outs)


def test_overrides_change_their_settings_and_leave_comments_and_the_rest(folder: Path) -> None:
    before = read_params(folder / "params.yaml")
    lines = (folder / "params.yaml").read_text().splitlines()

    apply_settings(folder, None, {"rl.algorithm.name": "remax", "rl.generator.replicas": 2, "sft.seed": 5})

    before["rl"]["algorithm"]["name"] = "remax"
    before["rl"]["generator"]["replicas"] = 2
    before["sft"]["seed"] = 5
    assert read_params(folder / "params.yaml") == before
    changed = set((folder / "params.yaml").read_text().splitlines()) - set(lines)
    assert len(changed) == 3
    assert any("servers started here" in line for line in changed)


def test_a_recipe_takes_the_place_of_the_settings(folder: Path) -> None:
    (folder / "recipes").mkdir()
    (folder / "recipes" / "small.yaml").write_text("rl: {seed: 1}\n")

    apply_settings(folder, "small", {"rl.seed": 2})

    assert read_params(folder / "params.yaml") == {"rl": {"seed": 2}}


@pytest.mark.parametrize("name", ["tldr_pythia_2.8b", "small", "a-b"])
def test_names_of_recipes_may_have_dots(folder: Path, name: str) -> None:
    (folder / "recipes").mkdir()
    (folder / "recipes" / f"{name}.yaml").write_text("rl: {seed: 1}\n")

    apply_settings(folder, RunParameters(recipe=name).recipe, {})

    assert (folder / "params.yaml").read_text() == "rl: {seed: 1}\n"


def test_an_unknown_recipe_is_refused_with_the_names_of_those_there_are(folder: Path) -> None:
    (folder / "recipes").mkdir()
    (folder / "recipes" / "small.yaml").touch()

    with pytest.raises(SettingError, match=r"recipe='smal': there is no recipes/smal\.yaml; recipes are: small"):
        apply_settings(folder, "smal", {})


def test_an_override_below_a_value_is_refused(folder: Path) -> None:
    with pytest.raises(SettingError, match=r'overrides: rl\.seed\.x="y": seed is no group of settings'):
        apply_settings(folder, None, {"rl.seed.x": "y"})


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"overrides": {"rll.seed": 1}}, "overrides"),
        ({"overrides": {"seed": 1}}, "overrides"),
        ({"stages": ["train_stf"]}, "stages"),
        ({"stages": []}, "stages"),
        ({"recipe": "../x"}, "recipe"),
        ({"seed": 1}, "seed"),
    ],
)
def test_a_wrong_parameter_is_refused_by_the_name_of_its_field(parameters: dict[str, object], field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        RunParameters.model_validate(parameters)

    assert caught.value.errors()[0]["loc"][0] == field


def test_a_placement_names_pools_that_there_are_and_a_folder_for_weights() -> None:
    for wrong, message in (
        ({"stages": {"train_sft": "tpu"}}, "'here', 'cpu' or 'gpu'"),
        ({"generators": 1}, "weights_dir"),
    ):
        with pytest.raises(ValidationError, match=message):
            Placement.model_validate(wrong)


def test_a_run_is_local_while_no_stage_and_no_generator_is_elsewhere() -> None:
    assert Placement(stages={"train_sft": "here"}).is_local
    assert not Placement(stages={"train_sft": "gpu"}).is_local
    assert not Placement(generators=1, weights_dir="/w").is_local


def test_a_run_brings_along_what_its_stages_need_in_the_pipelines_order() -> None:
    run = RunParameters(stages=["label_pairs", "train_sft"])

    assert list_needed(run, ROOT / "dvc.yaml") == ["prepare_model", "prepare_data", "train_sft", "label_pairs"]
    assert list_needed(RunParameters(), ROOT / "dvc.yaml") == list(STAGES)


def test_a_matrix_gives_every_combination() -> None:
    points = list_points(SweepParameters(matrix={"rl.algorithm.name": ["ppo", "remax"], "rl.seed": [0, 1]}))

    assert [describe_point(point) for point in points] == [
        "algorithm.name=ppo seed=0",
        "algorithm.name=ppo seed=1",
        "algorithm.name=remax seed=0",
        "algorithm.name=remax seed=1",
    ]


@pytest.mark.parametrize(
    ("settings", "first_own"),
    [
        (["rl.seed"], "train_policy"),
        (["judge.seed", "rl.algorithm.name"], "train_policy"),
        (["judge.seed"], "sample_policy"),
        (["sft.learner.lr"], "train_sft"),
        (["data.task.name"], "prepare_data"),
        (["reward.max_tokens"], "train_reward"),
    ],
)
def test_points_share_the_stages_before_the_first_that_reads_one_of_their_settings(
    settings: list[str], first_own: str
) -> None:
    shared = list_shared(ROOT / "dvc.yaml", list(STAGES), settings)

    assert STAGES[len(shared)] == first_own


def test_importing_the_parameters_does_not_import_prefect() -> None:
    code = "import sys, flows.parameters; sys.exit('prefect' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
