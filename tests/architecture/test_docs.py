"""The documents name files that exist, all of them, and settings that are accepted."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from stages.check_params import SECTIONS

MAP_LINE = re.compile(r"^- `((?:stages|flows)/[^`]*)`: \S", re.MULTILINE)
LINK = re.compile(r"\]\(([^)#]+)[^)]*\)")
SNIPPET = re.compile(r"^```yaml\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = [Path(name) for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(Path("docs").rglob("*.md"))


def read_snippets() -> list[dict[str, Any]]:
    return [yaml.safe_load(text) for text in SNIPPET.findall(Path("README.md").read_text())]


def test_the_file_map_names_every_python_file_once_and_no_other() -> None:
    named = MAP_LINE.findall(Path("README.md").read_text())
    there = [path.as_posix() for package in ("flows", "stages") for path in Path(package).rglob("*.py")]

    assert sorted(named) == sorted(there)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_between_files_lead_somewhere(page: Path) -> None:
    targets = [target for target in LINK.findall(page.read_text()) if "://" not in target]

    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("snippet", read_snippets(), ids=str)
def test_settings_shown_in_the_readme_are_accepted(snippet: dict[str, Any]) -> None:
    params = yaml.safe_load(Path("params.yaml").read_text())

    for name, values in snippet.items():
        SECTIONS[name].model_validate(params[name] | values)
