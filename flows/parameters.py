"""What a run of the pipeline may be told: the parameters of the deployments, as Prefect's page shows them."""

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import RoundTripRepresenter

from stages.common.config import SECTIONS
from stages.common.errors import SettingError
from stages.common.pipeline import find_upstream, read_stages
from stages.common.publish import write_text

Stage = Literal[
    "prepare_model",
    "prepare_data",
    "train_sft",
    "label_pairs",
    "train_reward",
    "train_policy",
    "sample_policy",
    "judge_policy",
]
"""The stages of dvc.yaml; tests/unit/flows/test_parameters.py compares the two."""
STAGES: tuple[Stage, ...] = get_args(Stage)
"""In the order in which they can run."""

Setting = Annotated[str, StringConstraints(pattern=rf"^({'|'.join(SECTIONS)})(\.[a-z][a-z0-9_]*)+$")]
"""A setting of params.yaml by its path, such as `rl.algorithm.name`."""
ONLY_SETTINGS: dict[str, Any] = {"additionalProperties": False}
"""Has Prefect's server refuse what is no setting, before there is a run."""
Queue = Literal["here", "cpu", "gpu"]
"""`here` is the worker that runs the flow itself; the others are work pools."""

RECIPES = Path("recipes")
RECIPE_NAME = r"^\w[\w.-]*$"
"""`tldr_pythia_2.8b` is one; a name that leads out of the folder is not."""


class Parameters(BaseModel):
    """A closed group of parameters."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Placement(Parameters):
    """On which workers the stages run."""

    stages: dict[Stage, Queue] = {}
    """Work pool of each stage that another worker runs; stages that are not named run `here`."""
    generators: int = Field(default=0, ge=0, le=64)
    """vLLM servers for train_policy, each a run of deployment generator/generator on pool `generator`. 0: the learner's
    machine starts its own, as rl.generator says."""
    weights_dir: str | None = None
    """Folder in which the learner leaves weights for those servers: all of them see it under this path."""

    @model_validator(mode="after")
    def check_weights_dir(self) -> "Placement":
        """Generators elsewhere need a way for the weights."""
        if self.generators and self.weights_dir is None:
            raise ValueError(
                f"placement.generators={self.generators} needs placement.weights_dir: a folder that learner and "
                "generators see under the same path"
            )
        return self

    @property
    def is_local(self) -> bool:
        """Whether one worker does everything."""
        return not self.generators and all(queue == "here" for queue in self.stages.values())


class RunParameters(Parameters):
    """One run of the pipeline, of committed code."""

    recipe: str | None = Field(default=None, pattern=RECIPE_NAME)
    """Settings to start from: recipes/NAME.yaml; without one, params.yaml."""
    overrides: dict[Setting, Any] = Field(default={}, json_schema_extra=ONLY_SETTINGS)
    """Settings that differ from those, such as {"rl.algorithm.name": "remax", "rl.seed": 1}."""
    stages: list[Stage] = Field(default=list(STAGES), min_length=1)
    """Which stages to bring up to date, with all that they need; DVC still skips what has not changed."""
    repository: str | None = None
    """Git address to clone. None: the worker's own checkout if one worker does everything, else its `origin`."""
    revision: str = "HEAD"
    """Commit, branch or tag. HEAD: where `repository` is null the commit of the worker's checkout, which has to be
    pushed if several workers run the stages."""


def list_needed(run: RunParameters, dvc_yaml: Path) -> list[Stage]:
    """The chosen stages and those before them, in the order in which they can run."""
    stages = read_stages(dvc_yaml)
    needed = {item for stage in run.stages for item in (stage, *find_upstream(stage, stages))}
    return [stage for stage in STAGES if stage in needed]


def find_recipe(folder: Path, recipe: str) -> Path:
    """The file of a recipe.

    Raises:
        SettingError: there is none of that name; with the names there are.
    """
    path = folder / RECIPES / f"{recipe}.yaml"
    if re.fullmatch(RECIPE_NAME, recipe) and path.is_file():
        return path
    # Names have dots, so the stem of a path will not do.
    names = ", ".join(sorted(item.name.removesuffix(".yaml") for item in path.parent.glob("*.yaml"))) or "none"
    raise SettingError(f"recipe={recipe!r}: there is no {RECIPES / recipe}.yaml; recipes are: {names}")


def apply_settings(folder: Path, recipe: str | None, overrides: dict[str, Any]) -> None:
    """Write the recipe and the overrides into `folder`'s params.yaml, keeping its comments.

    Raises:
        SettingError: there is no such recipe, or an override goes through something that is no section.
    """
    params = folder / "params.yaml"
    if recipe is not None:
        write_text(params, find_recipe(folder, recipe).read_text(encoding="utf-8"))
    if not overrides:
        return
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096  # else long lines of others are broken
    yaml.representer.add_representer(type(None), _write_null)
    content = yaml.load(params.read_text(encoding="utf-8"))
    for name, value in overrides.items():
        _set(content, name, value)
    with params.open("w", encoding="utf-8") as file:
        yaml.dump(content, file)


def _write_null(representer: RoundTripRepresenter, _: None) -> ScalarNode:
    return representer.represent_scalar("tag:yaml.org,2002:null", "null")


def _set(content: Any, name: str, value: Any) -> None:
    *sections, key = name.split(".")
    target = content
    for section in sections:
        target = target.get(section)
        if not isinstance(target, dict):
            raise SettingError(f"overrides: {name}={json.dumps(value)}: {section} is no group of settings")
    target[key] = value
