"""Every recipe can be planned, and `make plan` says with its exit code whether it would run."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.plan import EXIT_NO_ROOM, count_train_prompts, work_out
from flows.plan_status import explain
from stages.common.entry import EXIT_SETTING
from stages.plan.devices import GIB, Devices, parse_devices
from stages.plan.settings import Places, read_settings
from tests.unit.plan.plans import make_settings

RECIPES = sorted(Path("recipes").glob("*.yaml"))
CPU = Devices(False, (0, 1), 24 * GIB)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name.removesuffix(".yaml"))
def test_every_recipe_fits_two_gpus_of_80_gib(recipe: Path, tmp_path: Path) -> None:
    plan = work_out(read_settings(recipe), Places(tmp_path, tmp_path), parse_devices("2x80"), None)

    assert plan.exit_code == 0, "\n".join(plan.lines)
    assert len(plan.lines) < 60  # ten more are of the stages


def test_recipe_reviews_is_params_yaml() -> None:
    assert yaml.safe_load(Path("recipes/reviews.yaml").read_text()) == yaml.safe_load(Path("params.yaml").read_text())


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name.removesuffix(".yaml"))
def test_every_recipe_is_complete_and_in_the_table(recipe: Path) -> None:
    ours, full = yaml.safe_load(recipe.read_text()), yaml.safe_load(Path("params.yaml").read_text())
    name = recipe.name.removesuffix(".yaml")

    assert [f"{section}.{key}" for section in full for key in full[section] if key not in ours[section]] == []
    assert f"| `{name}` |" in Path("docs/recipes.md").read_text()
    assert recipe.read_text().startswith("# ")


@pytest.mark.parametrize(
    ("devices", "free_bytes", "exit_code", "line"),
    [
        (CPU, 100 * GIB, 0, "fits: the fullest is memory in train_policy"),
        (CPU, 1 * GIB, EXIT_NO_ROOM, "does not fit: 1.5 GiB are missing"),
        (Devices(False, (0, 1), 4 * GIB), None, EXIT_NO_ROOM, "does not fit: train_policy needs"),
        (parse_devices("1x4"), None, EXIT_NO_ROOM, "does not fit: train_policy needs"),
    ],
)
def test_what_does_not_fit_is_said_and_is_exit_code_3(
    tmp_path: Path, devices: Devices, free_bytes: float | None, exit_code: int, line: str
) -> None:
    plan = work_out(make_settings(tmp_path), Places(tmp_path, tmp_path), devices, free_bytes)

    assert plan.exit_code == exit_code
    assert line in "\n".join(plan.lines)


def test_a_wrong_setting_is_exit_code_2_even_if_it_does_not_fit(tmp_path: Path) -> None:
    settings = make_settings(tmp_path, sft__max_tokens=9000)

    plan = work_out(settings, Places(tmp_path, tmp_path), parse_devices("1x1"), None)

    assert plan.exit_code == EXIT_SETTING


def test_the_page_has_the_counts_of_the_run(tmp_path: Path) -> None:
    plan = work_out(make_settings(tmp_path), Places(tmp_path, tmp_path), CPU, None)

    page = "\n".join(plan.lines)
    assert "16 prompts, 64 completions sampled, 32 trained as 16 pairs" in page
    assert "352, 1,408 completions: 1.17 passes" in page  # of 500 - 80 - 120 prompts
    assert "    21       20                  21                  1" in page.splitlines()


def test_prompts_of_a_file_are_known_once_they_are_counted(tmp_path: Path) -> None:
    settings = make_settings(tmp_path, data__task={"name": "pairs", "source": "a.jsonl"})
    assert count_train_prompts(settings, tmp_path) is None

    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics/data.json").write_text('{"data/prompts/train": 70.0}')

    assert count_train_prompts(settings, tmp_path) == 70


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([{"changed deps": {"params.yaml": {"rl": "modified"}}}], "settings changed: rl"),
        (
            [{"changed deps": {"stages/rl": "modified", "artifacts/sft": "new"}}],
            "code changed: stages/rl; input changed: artifacts/sft",
        ),
        ([{"changed outs": {"artifacts/sft": "deleted"}}], "output artifacts/sft is missing"),
        (
            [{"changed outs": {"artifacts/sft": "modified"}}, "changed command"],
            "output artifacts/sft is changed; its command changed",
        ),
        ([{"changed deps": dict.fromkeys("abcde", "modified")}], "input changed: a, b, c and 2 more"),
    ],
)
def test_dvc_s_reasons_are_told_in_words(entries: list[Any], words: str) -> None:
    assert explain(entries) == words
