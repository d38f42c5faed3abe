"""Generators on other workers, from the learner's side: started, waited for, replaced, ended.

The stage is told of them by a file that names the URL of each slot. A slot whose server is gone gets a new run of
deployment `generator/generator`; its URL takes the old one's place in the file, where the stage looks again.
"""

import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import httpx
from prefect import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import PrefectHTTPStatusError

from flows.children import cancel_child, read_run, start_child
from flows.dvc import stop_running
from flows.execution import Order
from flows.generator import GeneratorOrder
from flows.servers import is_healthy
from flows.workspace import Workspace
from stages.common.errors import RunError
from stages.common.publish import write_json
from stages.generation.remote import VARIABLE

START_S = 900.0
"""Seconds until all generators must have answered once; a worker may first have to fetch the model."""
LOOK_EVERY_S = 2.0
GONE_S = 20.0
"""Seconds without a healthy answer after which a server is replaced."""
MAX_REPLACEMENTS = 5
"""Of one slot within one stage."""

_HINT = " (is there a worker of pool 'generator', with devices that no other worker of its machine has?)"

logger = logging.getLogger(__name__)


@dataclass
class Slot:
    """One place for a server."""

    number: int
    run_id: UUID
    url: str | None = None
    healthy_at: float = 0.0
    num_replacements: int = 0


@contextmanager
def serve_generators(order: Order, workspace: Workspace) -> Iterator[dict[str, str]]:
    """Environment of the stage, with as many generators as the run's placement wants for it.

    Raises:
        RunError: they did not come, or one could not be replaced; with the reason.
    """
    if order.stage != "train_policy" or not order.placement.generators or not workspace.needs(order.stage):
        yield {}
        return
    keeper = Keeper(order, workspace.path / ".slipstream" / "generators.json")
    try:
        keeper.start()
        yield {VARIABLE: str(keeper.path.resolve())}
    except RunError as error:
        if keeper.failure is not None:
            raise RunError(keeper.failure) from error
        raise
    finally:
        keeper.stop()


class Keeper:
    """Keeps every slot served, from a thread."""

    def __init__(self, order: Order, path: Path) -> None:
        self.path = path
        self.failure: str | None = None
        self._order = order
        self._slots: list[Slot] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="generators", daemon=True)

    def start(self) -> None:
        """Start a server for every slot and wait until all are healthy.

        Raises:
            RunError: not all were within `START_S`, or one could not be kept.
        """
        self._slots = [Slot(number, self._start_run(number).id) for number in range(self._order.placement.generators)]
        deadline = time.monotonic() + START_S
        self._look_at_all()
        while not all(slot.url for slot in self._slots):
            if time.monotonic() > deadline:
                raise RunError(f"generators were not ready within {START_S:.0f} s: {self._describe()}")
            time.sleep(LOOK_EVERY_S)
            self._look_at_all()
        self._thread.start()

    def stop(self) -> None:
        """End all of them."""
        self._is_over.set()
        if self._thread.ident is not None:
            self._thread.join()
        for slot in self._slots:
            try:
                cancel_child(slot.run_id)
            except (httpx.HTTPError, PrefectHTTPStatusError) as error:
                # It looks after its owner itself, and ends when that has ended.
                logger.warning("generator %d could not be cancelled: %s", slot.number, error)

    def _watch(self) -> None:
        while not self._is_over.wait(LOOK_EVERY_S):
            try:
                self._look_at_all()
            except RunError as error:
                self.failure = str(error)
                stop_running()
                return
            except (httpx.HTTPError, PrefectHTTPStatusError) as error:
                logger.warning("Prefect's server does not answer, generators go on: %s", error)

    def _look_at_all(self) -> None:
        for slot in self._slots:
            self._look_at(slot)
        urls = [slot.url for slot in self._slots]
        write_json(self.path, {"weights_dir": self._order.placement.weights_dir, "urls": urls})

    def _look_at(self, slot: Slot) -> None:
        """Note its URL, and replace it if it has ended or has not answered for long."""
        now = time.monotonic()
        if slot.url is not None and is_healthy(f"{slot.url}/health", timeout_s=5.0):
            slot.healthy_at, slot.num_replacements = now, 0
            return
        run = read_run(slot.run_id)
        is_over = run.state is None or run.state.is_final()
        if slot.url is None and not is_over:
            slot.url = read_url(slot.run_id)
            slot.healthy_at = now
        elif is_over or now - slot.healthy_at > GONE_S:
            self._replace(slot, run)

    def _replace(self, slot: Slot, run: FlowRun) -> None:
        reason = "does not answer" if run.state is None else f"{run.state.name}: {run.state.message or 'no answer'}"
        if slot.num_replacements >= MAX_REPLACEMENTS:
            raise RunError(f"generator {slot.number} was lost {MAX_REPLACEMENTS + 1} times, last: {reason}")
        logger.warning("generator %d at %s is lost (%s); starting another", slot.number, slot.url, reason)
        cancel_child(slot.run_id)
        slot.url, slot.num_replacements = None, slot.num_replacements + 1
        slot.run_id = self._start_run(slot.number, after=slot.run_id).id

    def _start_run(self, number: int, after: UUID | None = None) -> FlowRun:
        from prefect.runtime import flow_run

        owner = str(flow_run.id)
        order = GeneratorOrder(
            key=self._order.key,
            slot=number,
            repository=self._order.repository,
            revision=self._order.revision,
            has_remote=self._order.has_remote,
            owner=owner,
            attempt=flow_run.run_count,
        )
        # A server of an attempt before this one has other weights and another owner: each is started anew.
        key = f"{owner}-{flow_run.run_count}-generator-{number}-{after or 'first'}"
        name = f"generator-{number}"
        return start_child("generator/generator", {"order": order.model_dump(mode="json")}, key, name=name)

    def _describe(self) -> str:
        states = [(slot.number, read_run(slot.run_id).state) for slot in self._slots if slot.url is None]
        return "; ".join(
            f"generator {number}: {state.name if state else 'unknown'}"
            + (_HINT if state and not state.is_final() else "")
            for number, state in states
        )


def read_url(run_id: UUID) -> str | None:
    """Where a generator's run says that it serves; None before it does."""
    of_run = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run_id]))
    with get_client(sync_client=True) as client:
        artifacts = client.read_artifacts(artifact_filter=of_run)
    for artifact in artifacts:
        if artifact.type == "markdown" and artifact.data:
            return str(json.loads(str(artifact.description))["url"])
    return None
