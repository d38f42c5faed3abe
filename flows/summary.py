"""What a run leaves on Prefect's page: the table of its stages, and links to its numbers."""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import httpx
from prefect import get_run_logger
from prefect.artifacts import create_link_artifact, create_table_artifact
from prefect.exceptions import PrefectHTTPStatusError

from flows.workspace import Workspace

LINK_S = 120.0
"""Seconds that telling MLflow about a run's outs may take; the worker sends later what is not sent."""

_STAGES = "Run, cached (nothing had changed) or restored (from DVC's run cache); one row per attempt"

logger = logging.getLogger(__name__)


@dataclass
class StageRow:
    """What became of a stage."""

    stage: str
    worker: str
    outcome: str = "failed"
    seconds: float = 0.0

    @classmethod
    @contextmanager
    def measure(cls, stage: str, worker: str, rows: "list[StageRow]") -> "Iterator[StageRow]":
        """Add a row for one attempt, whatever becomes of it."""
        row, started = cls(stage, worker), time.monotonic()
        rows.append(row)
        try:
            yield row
        finally:
            row.seconds = round(time.monotonic() - started, 1)


def show_stages(rows: list[StageRow]) -> None:
    """The table of stages: run, cached or restored, on which pool, in how many seconds."""
    if rows:
        with _outage_is_no_failure():
            create_table_artifact([asdict(row) for row in rows], key="stages", description=_STAGES)


def finish_lineage(workspace: Workspace, variables: Mapping[str, str], *stages: str) -> None:
    """Tell MLflow which run made which outs; it may be away.

    Args:
        workspace: clone where the stages ran.
        variables: `describe_run` of the run.
        stages: those that were brought up to date; none means the whole pipeline was, which ends the run.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", "stages.link_runs", *stages],
            cwd=workspace.path,
            env=os.environ | variables,
            capture_output=True,
            text=True,
            timeout=LINK_S,
        )
    except subprocess.TimeoutExpired:
        get_run_logger().warning("lineage is not linked: stages.link_runs was not done after %.0f s", LINK_S)
        return
    if done.returncode:
        get_run_logger().warning("lineage is not linked: %s", done.stderr.strip()[-300:])


def show_links(workspace: Workspace) -> None:
    """Links to the run's page in MLflow, and to the one that lays it beside the newest others."""
    page, comparison = find_pages(workspace.key)
    with _outage_is_no_failure():
        if page is not None:
            text = f"pipeline-{workspace.key} in MLflow"
            create_link_artifact(
                page, link_text=text, key="mlflow-run", description="Settings, curves, samples, verdict"
            )
        if comparison is not None:
            text = "Beside the newest other runs in MLflow"
            create_link_artifact(
                comparison, link_text=text, key="mlflow-comparison", description="Settings and verdicts"
            )


@contextmanager
def _outage_is_no_failure() -> Iterator[None]:
    """What is shown is not worth a run whose stages are done; the log says what is not there."""
    try:
        yield
    except (httpx.HTTPError, PrefectHTTPStatusError) as error:
        logger.warning("Prefect's server does not answer, so its page lacks something: %s", error)


def find_pages(key: str) -> tuple[str | None, str | None]:
    """Addresses of a pipeline's pages in MLflow; None without a server, or when it is away."""
    from stages.common.results import compare_with_recent
    from stages.common.tracking_client import prepare_library
    from stages.common.tracking_urls import find_pipeline_url

    outage_errors = prepare_library()
    try:
        return find_pipeline_url(key), compare_with_recent(key)
    except outage_errors as error:
        logger.warning("MLflow does not answer, so there is no link to it: %s", error)
        return None, None


def find_results(keys: list[str]) -> tuple[dict[str, dict[str, float]], str | None]:
    """What the judge said of each run, and MLflow's page that lays them side by side."""
    from stages.common.results import compare_page, read_results
    from stages.common.tracking_client import prepare_library

    outage_errors = prepare_library()
    try:
        return read_results(keys), compare_page(keys)
    except outage_errors as error:
        logger.warning("MLflow does not answer, so there are no numbers to compare: %s", error)
        return {}, None
