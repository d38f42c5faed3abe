"""vLLM servers as one generator: least-loaded dispatch, weight swaps, supervision.

One thread runs an event loop on which everything here happens; the owner talks to it through `submit`, `publish` and
`wait`. Work is sent off in the order it came. A publication waits for its turn in that order and each server first
finishes what it samples (`drain`), or it overtakes and freezes what runs for the time of the swap (`in_flight`).

A server that ends, hangs or answers nonsense is given up: its prompts go to the front of the queue, it is started
again with the newest weights, probed, and used again.
"""

import asyncio
import contextlib
import functools
import logging
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import torch
from transformers import PreTrainedTokenizerBase

from stages.common.errors import GeneratorError
from stages.common.process import GuardedProcess
from stages.common.publish import remove_path
from stages.generation.config import FleetConfig, GenerationConfig, Publish
from stages.generation.probe import ProbeError
from stages.generation.protocol import (
    Event,
    Finished,
    Group,
    Lost,
    Published,
    RecordSpan,
    Request,
    Ticket,
    WeightsUpdate,
)
from stages.generation.replica import Replica
from stages.generation.transfer import Channel
from stages.generation.transfer_ipc import IpcChannel, export_from_gpu
from stages.generation.transfer_nccl import NcclChannel, NcclLink
from stages.generation.vllm_client import VllmClient
from stages.generation.vllm_server import ServerSettings, start_server

logger = logging.getLogger(__name__)

MAX_UNUSABLE = 3
"""Unusable answers in a row after which a server is started anew."""
QUEUED_SHARE = 0.5
"""Sequences a server is sent beyond `generation.max_num_seqs`, as a share of it. A prompt's sequences count until its
last one has finished, so without these some of the places in the server's batch would be empty."""


@dataclass(frozen=True)
class FleetPlan:
    """What a fleet is made of."""

    model: Path
    """First weights of every local server."""
    policy_version: int
    """Updates applied to `model`."""
    generation: GenerationConfig
    fleet: FleetConfig
    devices: Sequence[str | None]
    """Of each local server; None: `generation.cpu_cores`, or every GPU."""
    in_flight: bool
    seed: int
    log_dir: Path
    scratch: Path | None = None
    """Directory that the guards of local servers delete should this process be killed."""
    shared_model: Path | None = None
    """`model` where servers started elsewhere find it; None: under the same path."""
    publish: Publish = "files"
    """How new weights get to the servers."""


class Fleet:
    """A `Generator` of vLLM servers.

    Args:
        plan: servers and how they work.
        tokenizer: of the policy.
        record: told when each server generated, swapped and started.
    """

    def __init__(self, plan: FleetPlan, tokenizer: PreTrainedTokenizerBase, record: RecordSpan) -> None:
        self._plan = plan
        self._tokenizer = tokenizer
        self._record = record
        self._events: queue.Queue[Event | Exception] = queue.Queue()
        self._queue: deque[Ticket | WeightsUpdate] = deque()
        self._again: deque[Ticket] = deque()
        self._replicas: list[Replica] = []
        self._current = WeightsUpdate(plan.policy_version, plan.model)
        self._superseded: list[WeightsUpdate] = []
        self._unusable: Counter[Request] = Counter()
        self._main: asyncio.Future[None] | None = None
        self._is_started = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run_thread, name="fleet", daemon=True)
        self._thread.start()
        self._is_started.wait()

    def submit(self, ticket: Ticket) -> None:
        """See `Generator.submit`."""
        self._call(lambda: self._queue.append(ticket))

    def publish(self, update: WeightsUpdate) -> None:
        """See `Generator.publish`."""
        self._call(lambda: self._switch_to(update) if self._plan.in_flight else self._queue.append(update))

    def wait(self, timeout_s: float) -> list[Event]:
        """See `Generator.wait`."""
        events: list[Event] = []
        self._raise_failure()
        with contextlib.suppress(queue.Empty):
            item = self._events.get(timeout=timeout_s)
            while True:
                if isinstance(item, Exception):
                    self._failure = item
                    raise item
                events.append(item)
                item = self._events.get_nowait()
        return events

    def close(self) -> None:
        """End all local servers."""
        if self._main is not None:
            with contextlib.suppress(RuntimeError):  # it has ended, and its loop is closed
                self._loop.call_soon_threadsafe(self._main.cancel)
        self._thread.join()

    def pids(self) -> dict[str, int]:
        """Pid of the guard of each local server that is running."""
        return {item.name: item.process.pid for item in self._replicas if item.process is not None}

    # Everything below runs on the event loop.

    def _call(self, action: Callable[[], None]) -> None:
        def run() -> None:
            action()
            self._wake.set()

        self._raise_failure()
        with contextlib.suppress(RuntimeError):  # it has ended, and `wait` says why
            self._loop.call_soon_threadsafe(run)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run_thread(self) -> None:
        try:
            asyncio.run(self._run())
        except asyncio.CancelledError:
            pass
        except Exception as error:  # noqa: BLE001  everything that ends the fleet is the owner's to know
            self._events.put(error)
        finally:
            self._is_started.set()

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        # Idle connections are closed here before the server does it after 5 s: a request on a connection that is
        # being closed would look like a lost server.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=2.0)
        # No proxy of the environment: servers are on this machine or in its own network.
        async with httpx.AsyncClient(timeout=None, limits=limits, trust_env=False) as http:
            self._http = http
            self._replicas = list(self._make_replicas())
            self._main = asyncio.ensure_future(self._supervise_all())
            self._is_started.set()
            try:
                await self._main
            finally:
                await asyncio.shield(self._stop_all())

    def _make_replicas(self) -> Iterator[Replica]:
        plan = self._plan
        launchers = [functools.partial(self._launch, index) for index in range(plan.fleet.replicas)]
        for index, launch in enumerate([*launchers, *[None] * len(plan.fleet.urls)]):
            yield Replica(
                name=f"generator-{index}",
                launch=launch,
                connect=lambda url: VllmClient(url, plan.generation, self._tokenizer, self._http),
                config=plan.fleet,
                start_timeout_s=plan.generation.start_timeout_s,
                swap_timeout_s=plan.fleet.heartbeat_timeout_s + plan.generation.request_timeout_s,
                make_channel=self._make_channel,
                address="" if launch else plan.fleet.urls[index - plan.fleet.replicas],
            )

    def _make_channel(self, device: torch.device) -> Channel:
        """A way for weights into one server; they lie on `device`."""
        if self._plan.publish == "nccl":
            return NcclChannel(NcclLink(device))
        return IpcChannel(export_from_gpu)

    def _launch(self, index: int) -> tuple[GuardedProcess, str]:
        plan = self._plan
        return start_server(
            plan.model,
            plan.generation,
            ServerSettings(seed=plan.seed, devices=plan.devices[index], publish=plan.publish),
            log_path=plan.log_dir / f"generator-{index}.log",
            remove=[] if plan.scratch is None else [plan.scratch],
        )

    async def _supervise_all(self) -> None:
        tasks = [asyncio.ensure_future(self._supervise(replica)) for replica in self._replicas]
        tasks.append(asyncio.ensure_future(self._dispatch()))
        try:
            await asyncio.gather(*tasks)  # none of them returns; the first error ends the fleet
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _stop_all(self) -> None:
        for replica in self._replicas:
            replica.give_up("the fleet is closed")
        await asyncio.gather(*(replica.stop() for replica in self._replicas))
        self._superseded += [self._current, *(item for item in self._queue if isinstance(item, WeightsUpdate))]
        self._discard_old()

    async def _supervise(self, replica: Replica) -> None:
        while True:
            started = time.monotonic()
            try:
                await replica.start()
                await self._join(replica)
            except ProbeError:
                raise
            except (GeneratorError, TimeoutError, httpx.HTTPError) as error:
                _require_hope(replica, error)
                replica.give_up(f"{type(error).__name__}: {error}")
            else:
                self._record(replica.name, "start", started, time.monotonic(), replica.version)
                logger.info("%s is ready url=%s start_s=%.1f", replica.name, replica.url, time.monotonic() - started)
                self._wake.set()
                await replica.watch()
            await self._recover(replica)

    async def _join(self, replica: Replica) -> None:
        """Bring a server that has just started to the newest weights."""
        replica.is_swapping = True
        if replica.launch is None:
            first = self._plan.shared_model or self._plan.model
            await replica.take_over(WeightsUpdate(self._plan.policy_version, first))
        while replica.version != self._current.policy_version:
            update = self._current
            if update.path == self._plan.model and replica.launch is not None:
                await replica.relabel(update.policy_version)
            else:
                await replica.load(update, pause=False)
            replica.version = update.policy_version
            self._discard_old()
        replica.is_swapping = False
        replica.has_worked = True

    async def _recover(self, replica: Replica) -> None:
        replica.num_losses += 1
        reason = f"{replica.name} is lost: {replica.loss}; {replica.describe_log()}"
        await replica.stop()
        self._discard_old()
        if replica.launch is not None and replica.num_losses > self._plan.fleet.max_restarts:
            raise GeneratorError(
                f"{reason}\nlost {replica.num_losses} times without a completion in between, "
                f"rl.generator.max_restarts={self._plan.fleet.max_restarts}"
            )
        logger.warning("%s; starting it again", reason)
        if replica.launch is None:
            await asyncio.sleep(self._plan.fleet.heartbeat_s)

    async def _dispatch(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._take_one():
                pass

    def _take_one(self) -> bool:
        """Do the next thing in the queue if it can be done now."""
        waiting = self._again or self._queue
        if not waiting:
            return False
        item = waiting[0]
        if isinstance(item, WeightsUpdate):
            waiting.popleft()
            self._switch_to(item)
            return True
        replica = self._least_loaded(item.plan.num_completions)
        if replica is None:
            return False
        waiting.popleft()
        self._send(item, replica)
        return True

    def _least_loaded(self, num_sequences: int) -> Replica | None:
        """A server with the newest weights that has room; one that is idle always has."""
        room = int(self._plan.generation.max_num_seqs * (1 + QUEUED_SHARE)) - num_sequences
        fit = [
            replica
            for replica in self._replicas
            if replica.version == self._current.policy_version and not replica.is_swapping
            if replica.num_sequences <= max(room, 0)
        ]
        return min(fit, key=lambda replica: replica.num_sequences, default=None)

    def _send(self, ticket: Ticket, replica: Replica) -> None:
        # In flight a request may be sent before a swap and read the prompt after it, so none shares a prefix with
        # another; drained servers keep prefixes for all requests of a version.
        salt = f"{replica.version}-{ticket.number}-{ticket.attempt}" if self._plan.in_flight else str(replica.version)
        task = asyncio.ensure_future(replica.sample(ticket, salt))
        # A callback, because a task that is cancelled before it has begun runs none of its own code.
        task.add_done_callback(functools.partial(self._end_request, ticket, replica, replica.version))
        if not replica.running:
            replica.busy_since = time.monotonic()
        replica.running[task] = ticket.plan.num_completions
        replica.is_idle.clear()

    def _end_request(self, ticket: Ticket, replica: Replica, sent_at: int, task: "asyncio.Task[Group]") -> None:
        self._settle(ticket, replica, sent_at, task)
        del replica.running[task]
        if not replica.running:
            replica.is_idle.set()
            version = max(sent_at, replica.version)  # that of a lost replica is unknown
            try:
                self._record(replica.name, "generate", replica.busy_since, time.monotonic(), version)
            except OSError as error:  # of the timeline's file; asyncio would only log it
                self._fail(error)
        self._wake.set()

    def _settle(self, ticket: Ticket, replica: Replica, sent_at: int, task: "asyncio.Task[Group]") -> None:
        """Deliver what came of a request, or have its prompt sent again."""
        try:
            group = task.result()
            _require_versions(group, sent_at, self._current.policy_version)
        except asyncio.CancelledError:
            self._lose(ticket, "replica_lost", f"{replica.name}: {replica.loss}")
        except TimeoutError as error:
            self._lose(ticket, "timeout", f"{replica.name}: {error}")
            replica.give_up(str(error))
            self._count_failure(ticket, f"{replica.name}: {error}")
        except httpx.HTTPError as error:
            self._lose(ticket, "replica_lost", f"{replica.name}: {type(error).__name__} {error}")
            replica.give_up(f"{type(error).__name__} {error}")
        except GeneratorError as error:
            self._refuse(ticket, replica, " ".join(str(error).split()))
        except Exception as error:  # noqa: BLE001  else the prompt would be gone without a trace
            self._fail(error)
        else:
            replica.num_losses = replica.num_unusable = 0
            self._unusable.pop(ticket.request, None)
            self._events.put(Finished(ticket, group, replica.name))

    def _fail(self, error: Exception) -> None:
        """End the fleet; its owner is told why."""
        self._events.put(error)
        if self._main is not None:
            self._main.cancel()

    def _lose(self, ticket: Ticket, reason: str, detail: str) -> None:
        self._events.put(Lost(ticket, reason, " ".join(detail.split())))
        self._again.append(replace(ticket, attempt=ticket.attempt + 1))

    def _refuse(self, ticket: Ticket, replica: Replica, error: str) -> None:
        """An answer that cannot be used: ask again, of a server started anew if it keeps happening."""
        self._lose(ticket, "unusable_answer", f"{replica.name}: {error}")
        replica.num_unusable += 1
        logger.warning("%s: unusable answer attempt=%d: %s", replica.name, ticket.attempt, error)
        is_over = self._count_failure(ticket, f"{replica.name}: {error}")
        if not is_over and replica.num_unusable >= MAX_UNUSABLE:
            replica.give_up(f"{replica.num_unusable} unusable answers in a row, the last: {error}")

    def _count_failure(self, ticket: Ticket, error: str) -> bool:
        """Whether this prompt has now failed too often, by its own doing: then the fleet ends."""
        self._unusable[ticket.request] += 1
        if self._unusable[ticket.request] < self._plan.fleet.max_attempts:
            return False
        message = f"{error}; prompt {ticket.request.prompt_id} had rl.generator.max_attempts="
        self._fail(GeneratorError(f"{message}{self._plan.fleet.max_attempts} unusable answers, or none in time"))
        return True

    def _switch_to(self, update: WeightsUpdate) -> None:
        """Make these the weights that everything sent off from now on is sampled by."""
        self._superseded.append(self._current)
        self._current = update
        self._discard_old()
        for replica in self._replicas:
            if replica.version >= 0 and not replica.is_swapping:
                replica.is_swapping = True
                replica.swap = asyncio.ensure_future(self._swap(replica))

    async def _swap(self, replica: Replica) -> None:
        try:
            while replica.version not in (-1, self._current.policy_version):
                if not self._plan.in_flight:
                    await replica.is_idle.wait()
                if replica.lost.is_set():
                    break
                await self._load_current(replica)
        except ProbeError as error:
            self._fail(error)
        except (GeneratorError, TimeoutError, httpx.HTTPError) as error:
            replica.give_up(f"swapping weights failed: {type(error).__name__} {error}")
        except Exception as error:  # noqa: BLE001  else the server would stand still without a word
            self._fail(error)
        finally:
            replica.is_swapping = False
            self._wake.set()

    async def _load_current(self, replica: Replica) -> None:
        update, started = self._current, time.monotonic()
        if replica.running:  # frozen while it swaps, so it is not generating
            self._record(replica.name, "generate", replica.busy_since, started, replica.version)
            replica.busy_since = started
        await replica.load(update, pause=bool(replica.running))
        if replica.lost.is_set():
            return
        self._discard_old()
        ended = replica.busy_since = time.monotonic()
        replica.version = update.policy_version
        self._record(replica.name, "swap", started, ended, update.policy_version)
        self._events.put(Published(update.policy_version, replica.name, ended - started))

    def _discard_old(self) -> None:
        """Delete weights that no server is loading or will load."""
        loading = [replica.loading for replica in self._replicas]
        for update in list(self._superseded):
            if update not in loading:
                self._superseded.remove(update)
                if update.is_temporary and update.path is not None:
                    _remove(update.path)


def _remove(path: Path) -> None:
    try:
        remove_path(path)
    except OSError as error:
        logger.warning("cannot delete weights that are of no more use path=%s: %s", path, error)


def _require_hope(replica: Replica, error: Exception) -> None:
    """Raise if a server that could not be used from the start should not be tried again.

    A wrong setting is more likely than bad luck, except where a server that is started elsewhere goes away.
    """
    is_refusal = isinstance(error, GeneratorError)
    if replica.has_worked or (replica.launch is None and not is_refusal):
        return
    if is_refusal:
        raise error
    raise GeneratorError(f"{replica.name}: {type(error).__name__} {error}; {replica.describe_log()}") from error


def _require_versions(group: Group, oldest: int, newest: int) -> None:
    """Refuse completions that the server says were sampled by weights they cannot have been sampled by."""
    for completion in group:
        first_and_last = (completion.first_policy_version, completion.last_policy_version)
        versions = completion.token_policy_versions or first_and_last
        if not oldest <= min(versions) <= max(versions) <= newest:
            raise GeneratorError(
                f"prompt {completion.prompt_id}: sampled by policy_version {min(versions)} to {max(versions)}, "
                f"between {oldest} and {newest} was asked for"
            )
