"""A judged run as MLflow alone knows it: what a page that compares runs shows of it, wherever the run was made."""

import json
import math
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from stages.common.errors import RunError
from stages.common.judged_run import find_judge_run
from stages.common.tracking_names import COMMIT_TAG, PIPELINE_TAG, stage_tag

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

JUDGE, CHECKPOINT = "judge/", "checkpoint/"
SAMPLES, VERDICTS = "samples.json", "verdicts.json"
CURVE = tuple(
    name + end
    for name in ("kl_nats", "gold_win_rate", "proxy_win_rate", "llm_win_rate")
    for end in ("", "_interval_low", "_interval_high")
)
"""What is read of every version of a run, as evaluate_checkpoints logs it."""
JUDGE_SETTINGS = ("mode", "prompt", "temperature")
"""Beside its model: what makes the verdicts of two judges incomparable."""
RowT = TypeVar("RowT", bound="TableRow")


def _drop_non_finite(value: object) -> object:
    """Tables hold NaN where there is no number; a page's JSON has no such thing."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_drop_non_finite)]


class TableRow(BaseModel):
    """A row of a table that stage judge_policy left; columns that are not named here are left out."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class SampleRow(TableRow):
    """Of samples.json: `Comparison.to_rows`."""

    prompt_id: str
    prompt: str | None = None
    """Tables written before this column have none."""
    sft: str
    policy: str
    gold_sft: Number
    gold_policy: Number
    proxy_sft: Number
    proxy_policy: Number
    kl_nats: Number


class VerdictRow(TableRow):
    """Of verdicts.json: `verdict_rows.to_rows`."""

    prompt_id: str
    sample_index: int
    opponent: str
    win: Number
    choice_policy_first: Literal["first", "second", "tie"] | None
    choice_opponent_first: Literal["first", "second", "tie"] | None
    points_policy: int | None
    points_opponent: int | None
    reason_policy_first: str | None
    reason_opponent_first: str | None


@dataclass(frozen=True)
class ComparedRun:
    """A pipeline's run and what its judge said."""

    run_id: str
    """Of the pipeline's parent run."""
    experiment_id: str
    pipeline: str
    name: str
    commit: str
    is_dirty: bool
    """Whether files differed from the commit."""
    started_ms: int
    """Since 1970."""
    algorithm: str
    recipe: str | None
    opponent: str | None
    """Whom the LLM judge compared the policy with; None without an LLM judge."""
    judge_model: str | None
    judge_settings: tuple[str, ...]
    """Mode, rubric and temperature of the LLM judge; "unknown" for what the run does not say."""
    metrics: Mapping[str, float]
    """The judge's, without `judge/`; none is NaN or infinite."""
    curve: Mapping[int, Mapping[str, float]]
    """The judge's numbers of kept versions, by policy_version; empty where none was judged."""
    samples: Mapping[tuple[str, int], SampleRow]
    """By prompt_id and sample_index."""
    verdicts: Mapping[tuple[str, int], VerdictRow]
    """By prompt_id and sample_index; empty without an LLM judge."""


def read_run(client: "MlflowClient", run: str, experiment: str) -> ComparedRun:
    """Read everything the page needs of one run.

    Args:
        client: of `open_client`.
        run: id of the parent run or of the pipeline, or `latest`.
        experiment: name of the MLflow experiment that is searched.

    Raises:
        SettingError: there is no such run.
        RunError: its judge has not finished, or left no table of samples, or a table cannot be read.
    """
    parent, judge = find_judge_run(client, run, experiment)
    tags, params = parent.data.tags, parent.data.params
    samples = _read_table(client, judge, SAMPLES, SampleRow)
    if not samples:
        raise RunError(f"run {parent.info.run_id}: its judge_policy, {judge.info.run_id}, left no {SAMPLES}")
    verdicts = _read_table(client, judge, VERDICTS, VerdictRow)
    model = judge.data.params.get("judge.model", "None")
    return ComparedRun(
        run_id=str(parent.info.run_id),
        experiment_id=str(parent.info.experiment_id),
        pipeline=str(tags.get(PIPELINE_TAG, parent.info.run_id)),
        name=str(parent.info.run_name),
        commit=str(tags.get(COMMIT_TAG, "unknown")),
        is_dirty=tags.get("slipstream.git.dirty") == "true",
        started_ms=int(parent.info.start_time),
        algorithm=str(params.get("rl.algorithm.name", "unknown")),
        recipe=tags.get("slipstream.recipe"),
        opponent=str(judge.data.params.get("judge.against", "sft")) if verdicts or model != "None" else None,
        judge_model=None if model == "None" else str(model),
        judge_settings=tuple(str(judge.data.params.get(f"judge.{name}", "unknown")) for name in JUDGE_SETTINGS),
        metrics=_select(judge.data.metrics),
        curve=_read_curve(client, parent),
        samples=_number_samples(samples),
        verdicts={(row.prompt_id, row.sample_index): row for row in verdicts},
    )


def _select(metrics: Mapping[str, float]) -> dict[str, float]:
    return {
        name.removeprefix(JUDGE): float(value)
        for name, value in metrics.items()
        if name.startswith(JUDGE) and math.isfinite(value)
    }


def _read_curve(client: "MlflowClient", parent: "Run") -> dict[int, dict[str, float]]:
    run_id = parent.data.tags.get(stage_tag("evaluate_checkpoints"))
    if run_id is None:
        return {}
    logged = client.get_run(run_id).data.metrics
    curve: dict[int, dict[str, float]] = {}
    for name in CURVE:
        history = client.get_metric_history(run_id, CHECKPOINT + name) if CHECKPOINT + name in logged else ()
        for point in history:
            if math.isfinite(point.value):
                curve.setdefault(int(point.step), {})[name] = float(point.value)
    return dict(sorted(curve.items()))


def _read_table(client: "MlflowClient", run: "Run", name: str, row_type: type[RowT]) -> list[RowT]:
    """Rows of a table artifact; none if the run has no such table."""
    run_id = str(run.info.run_id)
    if name not in [item.path for item in client.list_artifacts(run_id)]:
        return []
    with tempfile.TemporaryDirectory(prefix="slipstream-") as folder:
        text = Path(client.download_artifacts(run_id, name, folder)).read_text(encoding="utf-8")
    try:
        table = json.loads(text)
        rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
        return [row_type.model_validate(row) for row in rows]
    except ValidationError as error:
        problem = error.errors()[0]
        place = f"column {'.'.join(map(str, problem['loc']))!r}: {problem['msg']}"
        raise RunError(f"run {run_id}: {name} is not a table of judge_policy: {place}") from error
    except (ValueError, TypeError, LookupError) as error:
        raise RunError(f"run {run_id}: {name} is not a table: {error}") from error


def _number_samples(rows: list[SampleRow]) -> dict[tuple[str, int], SampleRow]:
    """The table has a prompt's samples in their order, without their number."""
    seen: Counter[str] = Counter()
    samples = {}
    for row in rows:
        samples[row.prompt_id, seen[row.prompt_id]] = row
        seen[row.prompt_id] += 1
    return samples
