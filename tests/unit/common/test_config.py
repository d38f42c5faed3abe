from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pytest
from pydantic import Field, PositiveInt, model_validator
from ruamel.yaml import YAML

from stages.check_params import SECTIONS
from stages.common.config import Section, load_section, read_params
from stages.common.errors import SettingError


class Small(Section):
    """One variant."""

    name: Literal["small"]
    size: PositiveInt = 1

    @model_validator(mode="after")
    def check_size(self) -> Self:
        """As a part of several sections does."""
        if self.size == 13:
            raise ValueError("kind.size=13 with sft.lr or mankind.size; set kind.size to 12")
        return self


class Large(Section):
    """Another variant."""

    name: Literal["large"]
    size: PositiveInt = 100


class Toy(Section):
    """A section with a union in it."""

    kind: Annotated[Small | Large, Field(discriminator="name")]
    lr: float = 1.0


def load(tmp_path: Path, text: str) -> Toy:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    return load_section("sft", Toy, path)


def test_numbers_are_those_of_yaml_1_2_as_dvc_reads_them(tmp_path: Path) -> None:
    assert load(tmp_path, "sft: {kind: {name: small}, lr: 1e-4}").lr == 0.0001


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sft: {kind: {name: small}, lrr: 1}", "sft.lrr: unknown setting; settings are kind, lr"),
        ("sft: {kind: {name: small, colour: 1}}", "sft.kind.colour: unknown setting"),
        ("sft: {kind: {name: small, size: 0}}", "sft.kind.size=0: input should be greater than 0"),
        (
            "sft: {kind: {name: small, size: 13}}",
            "sft.kind.size=13 with sft.lr or mankind.size; set sft.kind.size to 12",
        ),
        ("sft: {kind: {name: big}}", "sft.kind.name='big': allowed: 'small', 'large'"),
        ("sft: {kind: {size: 3}}", "sft.kind.name: missing"),
        ("sft: {lr: 2}", "sft.kind: missing"),
        ("sft: {kind: {name: small}, lr: fast}", "sft.lr='fast': input should be a valid number"),
        ("sft: 3", "sft=3 is not a section of settings"),
        ("rl: {}", "section 'sft' is missing"),
        ("stf: {}", "unknown section 'stf'; sections are model, data, generation, sft"),
        ("sft: [", "not valid YAML"),
        ("", "holds no sections"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value_and_what_is_allowed(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SettingError) as caught:
        load(tmp_path, text)

    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_every_problem_gets_its_line(tmp_path: Path) -> None:
    with pytest.raises(SettingError) as caught:
        load(tmp_path, "sft: {kind: {name: small, size: -1}, lr: x, more: 1}")

    assert len(str(caught.value).splitlines()) == 3


def test_the_projects_own_params_are_valid_and_every_section_has_a_class() -> None:
    params = read_params()

    assert set(params) == set(SECTIONS)
    for name, section in SECTIONS.items():
        load_section(name, section)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("remx", {}, "rl.algorithm.name='remx': allowed: 'online_dpo', 'ppo', 'rloo', 'proximal_rloo', 'copg', "),
        ("remax", {"kl_coef": 0.0}, "rl.algorithm.kl_coef=0.0 with rl.algorithm.kl_mode='full_step'"),
        ("remax", {"kl_mode": "none"}, "rl.algorithm.kl_coef=0.05 with rl.algorithm.kl_mode='none'"),
        ("remax", {"samples_per_prompt": 0}, "rl.algorithm.samples_per_prompt=0: input should be greater than 0"),
        ("remax", {"beta": 0.1}, "rl.algorithm.beta: unknown setting"),
        ("remax", {"correction": {"kind": "decoupled"}}, "allowed here: 'none', 'token_tis', 'sequence_tis'"),
        ("remax", {"kl_loss_estimator": "k1"}, "rl.algorithm.kl_loss_estimator='k1' has no gradient in expectation"),
        ("rloo", {"samples_per_prompt": 1}, "rl.algorithm.samples_per_prompt=1: input should be greater than or"),
        ("grpo", {"kl_coef": 0.1}, "rl.algorithm.kl_coef=0.1: "),
        ("grpo", {"normaliser": {"by": "per_token", "tokens": 48}}, "rl.algorithm.normaliser.tokens=48"),
        ("ppo", {"correction": {"kind": "token_tis"}}, "allowed here: 'none', 'decoupled'"),
        (
            "ppo",
            {"correction": {"max_weight": 5}},
            "correction.max_weight=5.0 does nothing with rl.algorithm.correction.kind='none'",
        ),
        ("proximal_rloo", {"normaliser": {"by": "per_token"}}, "leave normaliser out"),
        ("reinforce_pp", {"samples_per_prompt": 1, "baseline": "group_mean"}, "leaves no reward"),
    ],
)
def test_impossible_settings_of_an_algorithm_are_refused(
    tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    params = read_params()
    params["rl"]["algorithm"] = {"name": name} | changes
    path = tmp_path / "params.yaml"
    YAML().dump(params, path)

    with pytest.raises(SettingError) as caught:
        load_section("rl", SECTIONS["rl"], path)

    assert message in str(caught.value)
