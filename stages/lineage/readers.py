"""Which runs read some data, by its DVC hash."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stages.common.errors import InputError
from stages.common.pipeline import read_lock
from stages.common.tracking_names import PARENT_TAG, PIPELINE_TAG
from stages.common.tracking_urls import find_experiments

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_HASH = re.compile(r"[0-9a-f]{6,32}(\.dir)?")
_PAGE = 500


@dataclass(frozen=True)
class Reader:
    """A run that read the data."""

    pipeline_id: str
    run: "Run"
    path: str
    """Where the data was."""
    md5: str


def find_readers(client: "MlflowClient", data: str) -> list[Reader]:
    """Runs that read this data, the oldest first.

    Args:
        client: of the tracking server.
        data: a DVC hash or the beginning of one, or a path that dvc.lock names.

    Raises:
        InputError: it is neither a hash nor a path in dvc.lock.
    """
    digest = _find_hash(data)
    runs = _search(client, f"datasets.digest LIKE '{digest}%'")
    pipelines: dict[str, str] = {}
    readers = []
    for run in runs:
        parent_id = run.data.tags.get(PARENT_TAG)
        if parent_id and parent_id not in pipelines:
            pipelines[parent_id] = client.get_run(parent_id).data.tags.get(PIPELINE_TAG, "unknown")
        for item in run.inputs.dataset_inputs:
            if item.dataset.digest.startswith(digest):
                pipeline_id = pipelines.get(parent_id or "", "none")
                readers.append(Reader(pipeline_id, run, item.dataset.name, item.dataset.digest))
    return readers


def _find_hash(data: str) -> str:
    """The hash itself, or that of a path in dvc.lock."""
    known: dict[str, str] = {}
    lock = read_lock().values()
    for entry in lock:
        known |= entry.deps
    for entry in lock:  # what a stage has made last, where one that reads it has not run since
        known |= entry.outs
    path = data.removeprefix("./").rstrip("/")
    if path in known:
        return known[path]
    if _HASH.fullmatch(data):
        return data
    parents = [name for name in known if path.startswith(f"{name}/")]
    hint = f"; dvc.lock has it as a part of {max(parents, key=len)}" if parents else ""
    raise InputError(f"DATA={data}: neither a DVC hash (6 to 32 hexadecimal digits) nor a path in dvc.lock{hint}")


def _search(client: "MlflowClient", filter_string: str) -> "list[Run]":
    runs: list[Run] = []
    token = None
    while True:
        page = client.search_runs(
            find_experiments(client),
            filter_string=filter_string,
            order_by=["attributes.start_time ASC"],
            max_results=_PAGE,
            page_token=token,
        )
        runs += page
        token = page.token
        if not token:
            return runs
