"""How params.yaml is read: one closed pydantic section per step of the pipeline."""

import re
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stages.common.errors import SettingError

PARAMS = Path("params.yaml")

SECTIONS = ("model", "data", "generation", "sft", "pairs", "reward", "rl", "judge", "promotion", "tracking")
"""Every section params.yaml may hold. A misspelt section would otherwise be ignored in silence."""


class Section(BaseModel):
    """A closed, frozen group of settings: an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


SectionT = TypeVar("SectionT", bound=Section)


def read_params(path: Path = PARAMS) -> dict[str, Any]:
    """Read params.yaml as YAML 1.2, the dialect DVC reads, so that `1e-4` is a number for both.

    Raises:
        SettingError: the file is missing, is not YAML, or holds an unknown section.
    """
    try:
        params = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SettingError(f"{path}: not found; run from the project's folder") from error
    except (YAMLError, UnicodeDecodeError) as error:
        line = " ".join(str(error).split())
        raise SettingError(f"{path}: not valid YAML: {line}") from error
    if not isinstance(params, dict):
        raise SettingError(f"{path}: holds no sections; expected {', '.join(SECTIONS)}")
    for name in params:
        if name not in SECTIONS:
            raise SettingError(f"{path}: unknown section {name!r}; sections are {', '.join(SECTIONS)}")
    return params


def load_section(name: str, section: type[SectionT], path: Path = PARAMS) -> SectionT:
    """Read and check one section of params.yaml.

    Raises:
        SettingError: one line per problem, each with `section.key`, the value and what is allowed.
    """
    params = read_params(path)
    if name not in params:
        raise SettingError(f"{path}: section {name!r} is missing")
    if not isinstance(params[name], dict):
        raise SettingError(f"{path}: {name}={params[name]!r} is not a section of settings")
    try:
        return section.model_validate(params[name])
    except ValidationError as error:
        lines = [_describe(name, section, params[name], problem) for problem in error.errors()]
        raise SettingError("\n".join(dict.fromkeys(lines))) from error


def _describe(name: str, section: type[Section], values: dict[str, Any], problem: ErrorDetails) -> str:
    """One pydantic problem as one line a person can act on."""
    where = ".".join([name, *_keys(values, problem["loc"])])
    match problem["type"]:
        case "extra_forbidden":
            return f"{where}: unknown setting{_known_keys(section, problem['loc'])}"
        case "missing":
            return f"{where}: missing"
        case "value_error":  # our own validators name the setting themselves
            return _name_in_full(where, str(problem["ctx"]["error"]))
        case "union_tag_invalid":
            context = problem["ctx"]
            key = str(context["discriminator"]).strip("'")
            return f"{where}.{key}={context['tag']!r}: allowed: {context['expected_tags']}"
        case "union_tag_not_found":
            return f"{where}.{str(problem['ctx']['discriminator']).strip(chr(39))}: missing"
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{where}={problem['input']!r}: {message}"


def _name_in_full(where: str, message: str) -> str:
    """What a part that several sections have calls learner.x becomes sft.learner.x, where that is the place."""
    keys = where.split(".")
    for number, key in enumerate(keys[1:], start=2):
        message = re.sub(rf"(?<![\w.]){re.escape(key)}\.", ".".join(keys[:number]) + ".", message)
    return message


def _keys(values: Any, loc: tuple[int | str, ...]) -> list[str]:
    """The location as keys of the file: without the tags that pydantic adds for the variants of a union."""
    keys = []
    for part in loc:
        is_tag = isinstance(values, dict) and part not in values and part in _texts(values)
        if is_tag:
            continue
        keys.append(str(part))
        values = values.get(part) if isinstance(values, dict) else None
    return keys


def _texts(values: dict[str, Any]) -> list[str]:
    return [value for value in values.values() if isinstance(value, str)]


def _known_keys(section: type[Section], loc: tuple[int | str, ...]) -> str:
    if len(loc) != 1:
        return ""
    return f"; settings are {', '.join(section.model_fields)}"
