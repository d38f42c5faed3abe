"""One vLLM server of a fleet: how it is started, joined, watched, swapped and given up."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from stages.common.errors import GeneratorError, RunError
from stages.common.process import GuardedProcess
from stages.generation.config import FleetConfig
from stages.generation.probe import ProbeCheck
from stages.generation.protocol import Group, Ticket, WeightsUpdate
from stages.generation.remote import locate
from stages.generation.transfer import Channel, MakeChannel, transfer
from stages.generation.vllm_client import VllmClient

logger = logging.getLogger(__name__)

HEALTH_POLL_S = 0.25
STOP_S = 5.0
"""Seconds a server gets to end by itself."""
STALL_S = 1.0
"""A time limit noticed later than this was missed by this process, which stood still (Ctrl-Z), not by the server."""


@dataclass
class Replica:
    """A server and what this process knows of it. Everything happens on the fleet's event loop."""

    name: str
    launch: Callable[[], tuple[GuardedProcess, str]] | None
    """Starts a local server; None for one that is started elsewhere."""
    connect: Callable[[str], VllmClient]
    config: FleetConfig
    start_timeout_s: float
    swap_timeout_s: float
    make_channel: MakeChannel | None = None
    """A way for weights that come by no file."""
    channel: Channel | None = None
    """Open since the first such weights of this server's life."""
    address: str = ""
    """Entry of `rl.generator.urls` of a server that is started elsewhere."""
    url: str = ""
    process: GuardedProcess | None = None
    version: int = -1
    """Weights it serves; −1 while it may not be used."""
    is_swapping: bool = False
    loading: WeightsUpdate | None = None
    has_worked: bool = False
    """Whether it has ever been ready."""
    running: dict["asyncio.Task[Group]", int] = field(default_factory=dict)
    """Requests in flight and how many sequences each is."""
    swap: "asyncio.Task[None] | None" = None
    """The swap that is under way, or the last one."""
    num_losses: int = 0
    """Times in a row it was lost without having sampled anything."""
    num_unusable: int = 0
    """Unusable answers in a row."""
    is_idle: asyncio.Event = field(default_factory=asyncio.Event)
    lost: asyncio.Event = field(default_factory=asyncio.Event)
    loss: str = ""
    busy_since: float = 0.0
    probe: ProbeCheck = field(default_factory=ProbeCheck)

    @property
    def num_sequences(self) -> int:
        """Sequences in flight."""
        return sum(self.running.values())

    @property
    def client(self) -> VllmClient:
        """What talks to it."""
        return self.connect(self.url)

    async def start(self) -> None:
        """Start it, or wait for it, until it is healthy.

        Raises:
            GeneratorError: a local server ended or was not healthy in time; the message holds its last log lines.
        """
        self.lost.clear()
        self.is_idle.set()
        self.probe = ProbeCheck()
        self.num_unusable = 0
        if self.launch is not None:
            self.process, self.url = self.launch()
        deadline = time.monotonic() + self.start_timeout_s
        while not await self._is_healthy():
            if self.process is not None and self.process.poll() is not None:
                raise GeneratorError(f"{self.name}: vLLM ended while starting; {self.describe_log()}")
            if self.process is not None and time.monotonic() > deadline:
                raise GeneratorError(
                    f"{self.name}: vLLM not healthy after generation.start_timeout_s={self.start_timeout_s:.0f}; "
                    f"{self.describe_log()}"
                )
            await asyncio.sleep(HEALTH_POLL_S)
        if self.process is not None:
            await self._warm_up(max(0.0, deadline - time.monotonic()))

    async def sample(self, ticket: Ticket, salt: str) -> Group:
        """What it answers to a ticket; see `VllmClient.sample`.

        A server whose engine is dead refuses every prompt for a while: that is the loss of the server, which cancels
        this, and not the fault of the prompt.

        Raises:
            GeneratorError: an answer that is not what was asked for, from a server that is alive.
            TimeoutError, httpx.HTTPError: the server failed.
        """
        try:
            return await self.client.sample(ticket.request, ticket.plan, salt)
        except GeneratorError as error:
            await self._beat()
            if self.lost.is_set():
                raise asyncio.CancelledError(self.loss) from error
            raise

    async def load(self, update: WeightsUpdate, *, pause: bool) -> None:
        """Swap weights and make sure that they are the ones being served.

        Args:
            update: what to load.
            pause: freeze what runs, instead of relying on nothing running.

        Raises:
            ProbeError: the server answers, and does not serve these weights.
            GeneratorError, TimeoutError, httpx.HTTPError: the server failed.
        """
        self.loading = update
        try:
            async with asyncio.timeout(self.swap_timeout_s):
                await self._load(update, pause=pause)
        except TimeoutError as error:
            raise TimeoutError(
                f"weights were not swapped within {self.swap_timeout_s:g} s, "
                "rl.generator.heartbeat_timeout_s + generation.request_timeout_s"
            ) from error
        finally:
            self.loading = None

    async def watch(self) -> None:
        """Return once it is lost: ended, hung, or given up by `give_up`."""
        while not self.lost.is_set():
            if self.process is not None and self.process.poll() is not None:
                self.give_up(f"ended with code {self.process.poll()}")
                return
            await self._beat()
            # wait_for would swallow a cancellation that comes together with the loss.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.config.heartbeat_s):
                    await self.lost.wait()

    def give_up(self, reason: str) -> None:
        """Stop using it; its requests and its swap end as cancelled."""
        if self.lost.is_set():
            return
        self.loss = reason
        self.version = -1
        self.lost.set()
        for task in self._tasks():
            task.cancel()

    async def stop(self) -> None:
        """Wait for what `give_up` cancelled, and end a local server and everything it started."""
        # A server started elsewhere can be back at once: nothing of its earlier life may reach into the next.
        await asyncio.gather(*self._tasks(), return_exceptions=True)
        process, self.process = self.process, None
        if process is not None:
            await asyncio.to_thread(process.stop, STOP_S)
        channel, self.channel = self.channel, None
        if channel is not None:
            await asyncio.to_thread(channel.close)

    async def take_over(self, first: WeightsUpdate) -> None:
        """Load our first weights into a server that others may have used.

        They may have left it paused, and with keys and values of their weights under our salts.

        Raises:
            GeneratorError, TimeoutError, httpx.HTTPError: the server failed.
        """
        await self.load(first, pause=True)
        async with asyncio.timeout(self.swap_timeout_s):
            await self.client.forget_kv_cache()
        self.version = first.policy_version

    async def relabel(self, policy_version: int) -> None:
        """Say which version the weights are that it was started with.

        Raises:
            GeneratorError, TimeoutError, httpx.HTTPError: the server failed.
        """
        async with asyncio.timeout(self.swap_timeout_s):
            await self.client.label(policy_version)

    def describe_log(self) -> str:
        """The last lines a local server wrote."""
        if self.process is None:
            return f"see the server's own log at {self.url}"
        return f"{self.process.log_path} ends with:\n{self.process.tail(12)}"

    async def _load(self, update: WeightsUpdate, *, pause: bool) -> None:
        is_frozen = pause or update.tensors is not None  # a transfer takes more than one step of the engine
        if is_frozen:
            await self.client.pause()
        await self._deliver(update)
        await self.client.label(update.policy_version)
        if is_frozen:
            if self.config.kv_cache == "recompute" or not pause:  # what is idle has no completion to keep them for
                await self.client.forget_kv_cache()
            await self.client.resume()
        served = await self.client.read_version()
        if served != str(update.policy_version):
            raise GeneratorError(f"{self.name} serves version {served} after version {update.policy_version} was sent")
        if update.probe is not None:
            self.probe.check(self.name, update, await self.client.probe(update.probe.token_ids))

    async def _deliver(self, update: WeightsUpdate) -> None:
        if update.path is not None:
            await self.client.load(update.path)
            return
        assert update.tensors is not None
        assert self.make_channel is not None
        if self.channel is None:
            self.channel = self.make_channel(next(iter(update.tensors.values())).device)
            await self.channel.open(self.client)
        await transfer(self.client, self.channel, update.tensors)

    def _tasks(self) -> list["asyncio.Task[Any]"]:
        return [*self.running, *([self.swap] if self.swap is not None else [])]

    async def _beat(self) -> None:
        limit, before, was_loading = self.config.heartbeat_timeout_s, (self.version, False), self.loading is not None
        try:
            served = await self._read_version(limit)
            if (self.version, self.is_swapping) == before and served != str(self.version):
                self.give_up(f"serves version {served} instead of {self.version}: somebody else swapped its weights")
        except TimeoutError:
            if was_loading or self.loading is not None:
                return  # its engine answers nobody while it reads weights; `load` has a limit of its own
            self.give_up(f"did not answer within rl.generator.heartbeat_timeout_s={limit:g}")
        except (httpx.HTTPError, GeneratorError) as error:
            self.give_up(f"{type(error).__name__}: {error}"[:300])

    async def _read_version(self, limit_s: float) -> str:
        """What it says it serves; asked again where the first answer may have come while this process stood still."""
        started = time.monotonic()
        try:
            async with asyncio.timeout(limit_s):
                return await self.client.read_version()
        except TimeoutError:
            if time.monotonic() - started < limit_s + STALL_S:
                raise
        async with asyncio.timeout(limit_s):
            return await self.client.read_version()

    async def _warm_up(self, limit_s: float) -> None:
        """Before it counts as ready: a server that works, but for the first time, would seem to hang."""
        try:
            async with asyncio.timeout(limit_s):
                await self.client.warm_up()
        except TimeoutError as error:
            raise GeneratorError(
                f"{self.name}: vLLM sampled nothing within generation.start_timeout_s={self.start_timeout_s:.0f}; "
                f"{self.describe_log()}"
            ) from error
        except httpx.HTTPError as error:
            raise GeneratorError(
                f"{self.name}: vLLM failed at its first sample: {error!r}; {self.describe_log()}"
            ) from error

    async def _is_healthy(self) -> bool:
        if self.launch is None:
            try:
                self.url = locate(self.address)  # another server may have taken its place
            except RunError as error:
                if not self.has_worked:
                    raise
                if self.url:  # once for each time it is lost
                    logger.warning("%s is looked for until its address can be read: %s", self.name, error)
                self.url = ""
            if not self.url:
                return False
        try:
            async with asyncio.timeout(5):
                await self.client.read_version()
        except (TimeoutError, httpx.HTTPError, GeneratorError):
            return False
        return True
