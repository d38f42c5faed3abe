"""What a replica takes for its server's fault."""

import asyncio
import contextlib
import time
from pathlib import Path
from typing import cast

from stages.generation.config import FleetConfig
from stages.generation.protocol import Lost, WeightsUpdate
from stages.generation.replica import STALL_S, Replica
from stages.generation.vllm_client import VllmClient
from tests.unit.generation import scripted_server as scripted
from tests.unit.generation.scripted_server import WEIGHT_INFO, Exchange, ScriptedServer
from tests.unit.generation.test_fleet import collect, lost, make_ticket, start_fleet


def test_a_dead_engine_is_the_loss_of_its_server_and_not_the_fault_of_a_prompt(tmp_path: Path) -> None:
    refuse = scripted.sends(b'{"error": "the engine is dead"}', 500)

    with ScriptedServer() as server:

        async def die(exchange: Exchange) -> None:
            server.broken[WEIGHT_INFO] = refuse
            await refuse(exchange)

        server.otherwise = die
        # Nobody looks at the server in time, and a single unusable answer would end the run.
        with start_fleet([server], tmp_path, heartbeat_s=20, max_attempts=1) as fleet:
            fleet.submit(make_ticket(0))
            events = collect(fleet, lambda events: bool(lost(events)))

    (event,) = events
    assert isinstance(event, Lost)
    assert event.reason == "replica_lost"
    assert "the engine is dead" in event.detail


class StandsStill:
    """A client whose answer comes while this process does not run, so that nobody reads it in time."""

    def __init__(self, num_stalls: int) -> None:
        self.num_left = num_stalls

    async def read_version(self) -> str:
        if self.num_left:
            self.num_left -= 1
            await asyncio.sleep(0.01)
            time.sleep(STALL_S + 0.3)
            await asyncio.sleep(0.01)
        return "0"


class Silent:
    """A client that gets no answer."""

    async def read_version(self) -> str:
        await asyncio.sleep(3600)
        return "0"


def watch(client: StandsStill | Silent, *, loading: WeightsUpdate | None = None, limit_s: float = 30) -> str:
    """Why the server was given up, if it was within the limit; a loss ends it at once."""
    replica = Replica(
        name="generator-0",
        launch=None,
        connect=lambda _: cast(VllmClient, client),
        config=FleetConfig(heartbeat_s=0.01, heartbeat_timeout_s=0.2),
        start_timeout_s=1,
        swap_timeout_s=1,
        version=0,
    )

    replica.loading = loading

    async def run() -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await replica.watch()

    asyncio.run(run())
    return replica.loss


def test_a_server_is_not_taken_for_hung_because_this_process_stood_still() -> None:
    assert watch(StandsStill(num_stalls=1), limit_s=(STALL_S + 0.3) * 2 + 0.5) == ""
    assert watch(StandsStill(num_stalls=2)) == "did not answer within rl.generator.heartbeat_timeout_s=0.2"


def test_a_server_that_loads_weights_may_answer_late() -> None:
    assert watch(Silent(), loading=WeightsUpdate(1, Path("weights")), limit_s=3) == ""
    assert watch(Silent()) == "did not answer within rl.generator.heartbeat_timeout_s=0.2"
