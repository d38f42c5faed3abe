"""The README.md of an exported model: what it is, what it was made from, what was measured."""

from collections.abc import Mapping
from typing import Any

from stages.models.config import HubSource, ModelConfig, PackageSource, PathSource

MARK = "<!-- slipstream export -->"
"""Tells an earlier export from a folder that happens to have its name."""


def render_model_card(
    model: ModelConfig, params: str, metrics: Mapping[str, Mapping[str, Any]], hashes: Mapping[str, str], commit: str
) -> str:
    """The card as Markdown with the front matter that model hubs read.

    Args:
        model: section `model`, for the base model.
        params: params.yaml as text.
        metrics: contents of each metrics file, by its name.
        hashes: md5 of every artifact in dvc.lock, by path.
        commit: of the code.
    """
    base = _name_base_model(model)
    parts = [
        _front_matter(model),
        f"{MARK}\n# A policy trained by Slipstream",
        f"{base}, fine-tuned on demonstrations and then by {_name_method(metrics)}. "
        "`generation_config.json` holds the distribution it was trained and judged with.",
        "## Licence\n\nThese weights derive from the base model, so its licence and terms of use apply to them, and "
        "those of the data it was tuned on. The default base model, SmolLM2-135M-Instruct, is Apache-2.0.",
        f"## Metrics\n\n{_table(('metric', 'value'), _flatten(metrics))}",
        f"## Data and models it was made from\n\nExported at commit `{commit}` of the code. Hashes as in dvc.lock:\n\n"
        + _table(("artifact", "md5"), {path: f"`{md5}`" for path, md5 in hashes.items()}),
        f"## Settings\n\n```yaml\n{params.strip()}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _name_base_model(model: ModelConfig) -> str:
    name = _name_source(model)
    return name if model.keep_layers == "all" else f"{name}, {model.keep_layers} of its layers"


def _name_source(model: ModelConfig) -> str:
    match model.source:
        case PackageSource(package=package, file=file):
            return f"`{file}` of the Python package `{package}`"
        case PathSource(path=path):
            return f"The model in `{path}`"
        case HubSource(repo=repo, revision=revision):
            return f"[{repo}](https://huggingface.co/{repo}) at `{revision}`"


def _name_method(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    if metrics.get("policy", {}).get("samples_total") == 0:
        return "offline DPO on labelled pairs"
    return f"reinforcement learning against a {metrics.get('reward', {}).get('kind', 'reward model')}"


def _front_matter(model: ModelConfig) -> str:
    lines = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [rlhf, slipstream]"]
    if isinstance(model.source, HubSource):
        lines.append(f"base_model: {model.source.repo}")
    return "\n".join(["---", *lines, "---"])


def _flatten(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Numbers and intervals by `file/name`; tables are left to the metrics files."""
    rows = {}
    for file, values in metrics.items():
        for name, value in values.items():
            if isinstance(value, int | float) or (isinstance(value, list) and _is_interval(value)):
                full_name = name if name.startswith(f"{file}/") else f"{file}/{name}"
                rows[full_name] = _format(value)
    return rows


def _format(value: float | list[float]) -> str:
    """Four significant digits; whole numbers as they are."""
    if isinstance(value, list):
        return " … ".join(_format(part) for part in value)
    return str(int(value)) if value == int(value) else f"{value:.4g}"


def _is_interval(value: list[Any]) -> bool:
    return len(value) == 2 and all(isinstance(part, int | float) for part in value)


def _table(header: tuple[str, str], rows: Mapping[str, str]) -> str:
    if not rows:
        return "None recorded."
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join([f"| {header[0]} | {header[1]} |", "|---|---|", *lines])
