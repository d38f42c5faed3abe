"""A fleet of stand-in servers over real HTTP: what they are told, and that no prompt is lost or answered twice."""

import contextlib
import gc
import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from stages.common.errors import GeneratorError
from stages.common.process import GuardedProcess, start_guarded
from stages.generation.config import FleetConfig, GenerationConfig
from stages.generation.fleet import Fleet, FleetPlan
from stages.generation.probe import ProbeError
from stages.generation.protocol import (
    Event,
    Finished,
    Lost,
    Probe,
    Published,
    Request,
    SamplingPlan,
    Ticket,
    WeightsUpdate,
)
from stages.generation.remote import locate
from tests.tiny import tiny_tokenizer
from tests.unit.generation import scripted_server as scripted
from tests.unit.generation.scripted_server import Answer, ScriptedServer

# A request that is cancelled at the moment its connection opens leaves that connection to the garbage collector:
# anyio's connect_tcp does not close what asyncio's create_connection just gave it.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
TOKENIZER = tiny_tokenizer()
TWO_SAMPLES = SamplingPlan(num_samples=2)
FOREVER = ("tail", "-f", "/dev/null")
GENERATION: dict[str, Any] = {"max_new_tokens": 4, "max_prompt_tokens": 8, "max_num_seqs": 3, "request_timeout_s": 30}
"""A server is sent int(1.5 * 3) = 4 sequences at most."""
PAUSE = "/pause?mode=keep&clear_cache=false"
FORGET = "/reset_prefix_cache?reset_running_requests=true"
UNUSABLE: dict[str, Answer] = {
    "too few completions": scripted.too_few_completions,
    "too few logprobs": scripted.too_few_logprobs,
    "NaN": scripted.wrong_logprob(float("nan")),
    "-inf": scripted.wrong_logprob(float("-inf")),
    "a positive logprob": scripted.wrong_logprob(1.0),
    "no logprob": scripted.wrong_logprob(None),
    "what vLLM sends for NaN": scripted.wrong_logprob(-9999.0),
    "a completion that was aborted": scripted.aborted,
    "no version": scripted.wrong_versions(),
    "a version too few": scripted.wrong_versions(("0", 0, 1)),
    "a version that is no number": scripted.wrong_versions(("default", 0, 2)),
    "an older version than was asked": scripted.wrong_versions(("-1", 0, 1), ("0", 1, 2)),
    "a version that was never published": scripted.wrong_versions(("0", 0, 1), ("7", 1, 2)),
    "a span without end": scripted.wrong_versions(("0", 0, 10**15)),
    "HTTP 500": scripted.sends(b'{"error":\n"out of memory"}', 500),
    "no JSON": scripted.sends(b"<html>"),
    "no text": scripted.sends(b'{"a": "\xff\xfe"}'),
    "nothing": scripted.sends(b""),
    "another JSON": scripted.sends(b"[1, 2]"),
    "nested without end": scripted.sends(b"[" * 200_000),
}
GONE: dict[str, Answer] = {"truncated": scripted.truncated, "closed": scripted.closed}
LATE: dict[str, Answer] = {"silent": scripted.silent, "dripping": scripted.dripping}


@pytest.fixture
def servers() -> Iterator[list[ScriptedServer]]:
    with scripted.scripted_servers(2) as both:
        yield both


@pytest.fixture
def server(servers: list[ScriptedServer]) -> ScriptedServer:
    return servers[0]


@dataclass
class Watch:
    """Counts how often a server became ready."""

    ready: list[str] = field(default_factory=list)

    def record(self, role: str, kind: str, started: float, ended: float, policy_version: int) -> None:
        assert started <= ended
        assert policy_version >= 0
        if kind == "start":
            self.ready.append(role)


def make_plan(
    path: Path,
    *,
    in_flight: bool = False,
    request_timeout_s: int = 30,
    shared_model: Path | None = None,
    **fleet: Any,
) -> FleetPlan:
    settings: dict[str, Any] = {"replicas": 0, "weights_dir": str(path), "heartbeat_s": 0.05} | fleet
    (path / "base").mkdir(exist_ok=True)
    return FleetPlan(
        model=path / "base",
        policy_version=0,
        generation=GenerationConfig(**GENERATION | {"request_timeout_s": request_timeout_s}),
        fleet=FleetConfig(**settings),
        devices=[None] * int(settings["replicas"]),
        in_flight=in_flight,
        seed=0,
        log_dir=path,
        shared_model=shared_model,
    )


@contextlib.contextmanager
def start_fleet(
    servers: Sequence[ScriptedServer],
    path: Path,
    *,
    num_ready: int | None = None,
    watch: Watch | None = None,
    **settings: Any,
) -> Iterator[Fleet]:
    """A fleet of which all servers, or `num_ready`, can be used already."""
    watch = watch or Watch()
    plan = make_plan(path, **{"urls": tuple(server.url for server in servers)} | settings)
    with contextlib.closing(Fleet(plan, TOKENIZER, watch.record)) as running:
        wait_until(lambda: len(watch.ready) >= (len(servers) if num_ready is None else num_ready))
        yield running


class LocalFleet(Fleet):
    """Its one local server is a process that does nothing; the stand-in answers for it."""

    def __init__(self, plan: FleetPlan, server: ScriptedServer, command: Sequence[str] = FOREVER) -> None:
        self.server, self.command = server, command
        self.processes: list[GuardedProcess] = []
        super().__init__(plan, TOKENIZER, Watch().record)

    def _launch(self, index: int) -> tuple[GuardedProcess, str]:
        log_path = self._plan.log_dir / f"generator-{index}.log"
        self.processes.append(start_guarded(self.command, log_path=log_path))
        return self.processes[-1], self.server.url


@contextlib.contextmanager
def start_local_fleet(
    server: ScriptedServer, path: Path, command: Sequence[str] = FOREVER, **settings: Any
) -> Iterator[LocalFleet]:
    plan = make_plan(path, replicas=1, **settings)
    with contextlib.closing(LocalFleet(plan, server, command)) as running:
        yield running


def make_ticket(number: int, plan: SamplingPlan = TWO_SAMPLES) -> Ticket:
    return Ticket(number, Request(f"prompt-{number}", (number, 1), seed=number), plan)


def make_update(path: Path, version: int, **more: Any) -> WeightsUpdate:
    weights = path / f"w{version}"
    weights.write_text("weights")
    return WeightsUpdate(version, weights, **more)


def wait_until(is_true: Callable[[], object], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, "timed out"
        threading.Event().wait(0.005)


def collect(fleet: Fleet, is_enough: Callable[[list[Event]], bool], timeout_s: float = 20) -> list[Event]:
    events: list[Event] = []
    deadline = time.monotonic() + timeout_s
    while not is_enough(events):
        assert time.monotonic() < deadline, f"timed out: finished {numbers(events)}, {len(lost(events))} times lost"
        events += fleet.wait(timeout_s=0.05)
    return events


def finish(fleet: Fleet, count: int) -> list[Event]:
    return collect(fleet, lambda events: len(finished(events)) >= count)


def finished(events: Sequence[Event]) -> list[Finished]:
    return [event for event in events if isinstance(event, Finished)]


def lost(events: Sequence[Event]) -> list[Lost]:
    return [event for event in events if isinstance(event, Lost)]


def is_published(version: int, replica: str = "generator-0") -> Callable[[list[Event]], bool]:
    return lambda events: any(
        isinstance(event, Published) and (event.policy_version, event.replica) == (version, replica) for event in events
    )


def numbers(events: Sequence[Event]) -> list[int]:
    return sorted(event.ticket.number for event in finished(events))


def require_own_tokens(events: Sequence[Event]) -> None:
    """The stand-in's first token is the sum of the prompt plus the sample's number."""
    for event in finished(events):
        tokens = [completion.token_ids for completion in event.group]
        assert tokens == [(event.ticket.number + 1 + index, scripted.EOS) for index in range(len(tokens))]
        assert {completion.prompt_id for completion in event.group} == {event.ticket.request.prompt_id}


# What one prompt meets.


def test_completions_are_what_the_server_says(server: ScriptedServer, tmp_path: Path) -> None:
    with start_fleet([server], tmp_path) as fleet:
        fleet.submit(make_ticket(3, SamplingPlan(num_samples=2, with_greedy=True)))
        (event,) = finished(finish(fleet, 1))

    assert event.replica == "generator-0"
    assert [(item.is_greedy, item.sample_index) for item in event.group] == [(False, 0), (False, 1), (True, 0)]
    assert [item.token_ids for item in event.group] == [(4, 258), (5, 258), (4, 258)]  # 3 + 1 + index
    assert {item.sampling_logprobs for item in event.group} == {(-0.5, -0.25)}
    assert {(item.first_policy_version, item.last_policy_version) for item in event.group} == {(0, 0)}
    assert all(item.is_finished and item.token_policy_versions == () for item in event.group)


@pytest.mark.parametrize("kind", UNUSABLE)
def test_an_unusable_answer_is_asked_for_again(server: ScriptedServer, tmp_path: Path, kind: str) -> None:
    server.script((1, 1), UNUSABLE[kind], UNUSABLE[kind])

    with start_fleet([server], tmp_path) as fleet:
        for number in range(4):
            fleet.submit(make_ticket(number))
        events = finish(fleet, 4)

    assert [(event.reason, event.ticket.number, event.ticket.attempt) for event in lost(events)] == [
        ("unusable_answer", 1, 0),
        ("unusable_answer", 1, 1),
    ]
    assert all("generator-0" in event.detail and "\n" not in event.detail for event in lost(events))
    assert sorted((event.ticket.number, event.ticket.attempt) for event in finished(events)) == [
        *((0, 0), (1, 2), (2, 0), (3, 0))
    ]
    assert server.told("load") == ["load base"]
    require_own_tokens(events)


def test_a_proxy_of_the_environment_is_not_asked_for_servers(
    server: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "socks5://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)

    with start_fleet([server], tmp_path) as fleet:
        fleet.submit(make_ticket(1))
        finish(fleet, 1)


def test_a_timeline_that_cannot_be_written_ends_the_fleet(server: ScriptedServer, tmp_path: Path) -> None:
    class Full(Watch):
        def record(self, role: str, kind: str, started: float, ended: float, policy_version: int) -> None:
            super().record(role, kind, started, ended, policy_version)
            if kind == "generate":
                raise OSError(28, "No space left on device", "timeline.jsonl")

    with start_fleet([server], tmp_path, watch=Full()) as fleet:
        fleet.submit(make_ticket(0))
        with pytest.raises(OSError, match=r"timeline\.jsonl"):
            finish(fleet, 2)


@pytest.mark.parametrize("kind", [*GONE, *LATE])
def test_a_server_that_breaks_off_is_brought_back(server: ScriptedServer, tmp_path: Path, kind: str) -> None:
    server.script((1, 1), (GONE | LATE)[kind])

    with start_fleet([server], tmp_path, request_timeout_s=4) as fleet:
        for number in range(4):
            fleet.submit(make_ticket(number))
        events = finish(fleet, 4)

    first = lost(events)[0]
    assert (first.ticket.number, first.reason) == (1, "timeout" if kind in LATE else "replica_lost")
    assert {event.reason for event in lost(events)[1:]} <= {"replica_lost"}
    assert "generator-0" in first.detail
    assert numbers(events) == [0, 1, 2, 3]
    assert {event.ticket.number: event.ticket.attempt for event in finished(events)} == {
        number: sum(event.ticket.number == number for event in lost(events)) for number in range(4)
    }
    assert server.told("load") == ["load base"] * 2
    require_own_tokens(events)


def test_a_hung_server_is_noticed_by_its_heartbeat(servers: list[ScriptedServer], tmp_path: Path) -> None:
    hung = servers[0]
    hung.otherwise = scripted.silent

    with start_fleet(servers, tmp_path, heartbeat_timeout_s=0.3) as fleet:
        for number in range(4):
            fleet.submit(make_ticket(number))
        wait_until(hung.samples)
        hung.is_hung = True
        events = finish(fleet, 4)

    assert {event.reason for event in lost(events)} == {"replica_lost"}
    assert "rl.generator.heartbeat_timeout_s=0.3" in lost(events)[0].detail
    assert {event.replica for event in finished(events)} == {"generator-1"}
    assert numbers(events) == [0, 1, 2, 3]


def test_a_half_that_failed_takes_its_other_half_along(server: ScriptedServer, tmp_path: Path) -> None:
    """Samples and greedy completion are two requests: none may still run when its prompt counts as lost."""

    async def hold_samples_and_refuse_greedy(exchange: scripted.Exchange) -> None:
        if exchange.body["sampling_params"]["n"] == 2:
            await scripted.silent(exchange)
        await exchange.server.released.wait()
        await exchange.send(b"", status=500)

    server.script((1, 1), *[hold_samples_and_refuse_greedy] * 2)
    with start_fleet([server], tmp_path) as fleet:
        fleet.submit(make_ticket(1, SamplingPlan(num_samples=2, with_greedy=True)))
        wait_until(lambda: len(server.samples()) == 2)
        server.release()
        events = finish(fleet, 1)
        wait_until(lambda: any(call.path == "/gone" for call in server.calls))

    assert numbers(events) == [1]
    assert [event.reason for event in lost(events)] == ["unusable_answer"]


def test_a_prompt_that_is_lost_before_it_was_sent_is_sent_again(server: ScriptedServer, tmp_path: Path) -> None:
    with start_fleet([server], tmp_path) as fleet:
        fleet.submit(make_ticket(0))
        finish(fleet, 1)

        def send_and_give_up() -> None:
            fleet._queue.append(make_ticket(1))
            fleet._take_one()
            fleet._replicas[0].give_up("in the same turn of the loop")

        fleet._call(send_and_give_up)
        events = finish(fleet, 1)

    assert [(event.reason, event.ticket.number) for event in lost(events)] == [("replica_lost", 1)]
    assert numbers(events) == [1]


def test_a_lost_prompt_goes_first(server: ScriptedServer, tmp_path: Path) -> None:
    server.script((0, 1), scripted.too_few_completions)

    with start_fleet([server], tmp_path) as fleet:
        server.pause()
        for number in range(3):
            fleet.submit(make_ticket(number, SamplingPlan(num_samples=4)))  # one at a time
        server.resume()
        finish(fleet, 3)

    assert [call.prompt[0] for call in server.samples()] == [0, 0, 1, 2]


# When to stop trying.


def test_a_prompt_that_is_never_answered_in_time_ends_the_run(server: ScriptedServer, tmp_path: Path) -> None:
    server.otherwise = scripted.silent

    with start_fleet([server], tmp_path, max_attempts=2, request_timeout_s=1) as fleet:
        fleet.submit(make_ticket(5))
        with pytest.raises(GeneratorError, match=r"prompt-5 had rl\.generator\.max_attempts=2 .*, or none in time"):
            finish(fleet, 1)


@pytest.mark.parametrize("url", ["10.0.0.7:8000", "http://10.0.0.7:8o00", "http://", "ftp://10.0.0.7"])
def test_what_can_be_no_server_is_refused(url: str) -> None:
    with pytest.raises(ValidationError, match=rf"rl\.generator\.urls: '{url}' is no URL; allowed: such as http://"):
        FleetConfig(urls=(url,), weights_dir="weights")


@pytest.mark.parametrize("kind", ["too few completions", "HTTP 500", "no JSON"])
def test_garbage_without_end_ends_the_run_with_one_clear_line(
    server: ScriptedServer, tmp_path: Path, kind: str
) -> None:
    server.otherwise = UNUSABLE[kind]

    with start_fleet([server], tmp_path, max_attempts=2) as fleet:
        fleet.submit(make_ticket(5))
        fleet.submit(make_ticket(6))
        with pytest.raises(GeneratorError) as caught:
            finish(fleet, 1)
        message = str(caught.value)

        for ask in (lambda: fleet.wait(1), lambda: fleet.submit(make_ticket(7))):
            with pytest.raises(GeneratorError):
                ask()

    assert "\n" not in message
    assert "generator-0" in message
    assert "rl.generator.max_attempts=2" in message
    assert "prompt-5" in message or "prompt-6" in message


def test_only_unusable_answers_count_as_attempts(server: ScriptedServer, tmp_path: Path) -> None:
    bad = scripted.too_few_completions
    server.script((0, 1), scripted.closed, scripted.closed, bad, scripted.closed)

    with start_fleet([server], tmp_path, max_attempts=2) as fleet:
        fleet.submit(make_ticket(0))
        events = finish(fleet, 1)

    reasons = [event.reason for event in lost(events)]
    assert reasons == ["replica_lost", "replica_lost", "unusable_answer", "replica_lost"]


def test_three_unusable_answers_in_a_row_have_the_server_brought_up_anew(
    server: ScriptedServer, tmp_path: Path
) -> None:
    server.script((0, 1), *[scripted.too_few_completions] * 3)

    with start_fleet([server], tmp_path, max_attempts=9) as fleet:
        fleet.submit(make_ticket(0))
        events = finish(fleet, 1)

    assert [event.reason for event in lost(events)] == ["unusable_answer"] * 3
    assert server.told("load") == ["load base"] * 2


def test_answers_between_forgive_unusable_ones_of_a_server_and_of_a_prompt(
    server: ScriptedServer, tmp_path: Path
) -> None:
    with start_fleet([server], tmp_path, max_attempts=3) as fleet:
        for _ in range(2):  # the same prompt again, as in evaluations
            server.script((0, 1), *[scripted.too_few_completions] * 2)
            fleet.submit(make_ticket(0))
            assert [event.reason for event in lost(finish(fleet, 1))] == ["unusable_answer"] * 2

    assert server.told("load") == ["load base"]  # four in all, never three in a row


def test_a_call_after_the_end_says_why_it_ended(server: ScriptedServer, tmp_path: Path) -> None:
    server.otherwise = scripted.too_few_completions

    with start_fleet([server], tmp_path, max_attempts=1) as fleet:
        fleet.submit(make_ticket(0))
        wait_until(lambda: not fleet._thread.is_alive())
        fleet.submit(make_ticket(1))  # nobody has told its owner yet
        fleet.publish(make_update(tmp_path, 1))

        with pytest.raises(GeneratorError, match=r"rl\.generator\.max_attempts=1"):
            finish(fleet, 1)


# Several servers.


def test_a_slow_server_gets_no_more_than_it_has_room_for(servers: list[ScriptedServer], tmp_path: Path) -> None:
    slow, quick = servers
    slow.otherwise = quick.otherwise = scripted.held

    with start_fleet(servers, tmp_path) as fleet:
        for number in range(10):
            fleet.submit(make_ticket(number))
        wait_until(lambda: len(slow.samples()) == 2)
        quick.release()
        events = finish(fleet, 8)
        assert {event.replica for event in finished(events)} == {"generator-1"}
        slow.release()
        events += finish(fleet, 2)

    assert len(slow.samples()) == 2  # two prompts of two samples are 4 sequences, 1.5 * max_num_seqs=3
    assert slow.most_at_once == 4
    assert quick.most_at_once <= 4
    assert numbers(events) == list(range(10))
    assert not lost(events)


def test_work_goes_to_the_server_that_has_least(servers: list[ScriptedServer], tmp_path: Path) -> None:
    for server in servers:
        server.otherwise = scripted.held

    with start_fleet(servers, tmp_path) as fleet:
        for number, num_samples in enumerate((2, 1, 1, 1)):  # loads after each: 2+0, 2+1, 2+2, 3+2
            fleet.submit(make_ticket(number, SamplingPlan(num_samples)))
        wait_until(lambda: sum(len(server.samples()) for server in servers) == 4)
        sent = sorted(sorted(call.prompt[0] for call in server.samples()) for server in servers)
        for server in servers:
            server.release()
        finish(fleet, 4)

    assert sent in ([[0, 3], [1, 2]], [[0], [1, 2, 3]])


def test_a_prompt_larger_than_a_server_is_sent_to_an_idle_one(server: ScriptedServer, tmp_path: Path) -> None:
    with start_fleet([server], tmp_path) as fleet:
        for number in range(2):
            fleet.submit(make_ticket(number, SamplingPlan(num_samples=7)))
        events = finish(fleet, 2)

    assert [len(event.group) for event in finished(events)] == [7, 7]
    assert server.most_at_once == 7


@pytest.mark.parametrize("in_flight", [False, True])
def test_a_server_that_went_away_and_came_back_is_used_with_the_newest_weights(
    servers: list[ScriptedServer], tmp_path: Path, in_flight: bool
) -> None:
    leaving, staying = servers
    leaving.otherwise = staying.otherwise = scripted.held  # else the quicker one could get more than its half
    watch = Watch()

    with start_fleet(servers, tmp_path, in_flight=in_flight, watch=watch) as fleet:
        for number in range(4):
            fleet.submit(make_ticket(number))
        wait_until(lambda: len(leaving.samples()) == 2)
        leaving.go_away()
        staying.release()
        events = finish(fleet, 4)
        fleet.publish(make_update(tmp_path, 1))
        fleet.publish(make_update(tmp_path, 2))
        events += collect(fleet, is_published(2, "generator-1"))
        leaving.calls.clear()
        leaving.otherwise = scripted.good
        leaving.come_back()
        staying.otherwise = scripted.silent
        fleet.submit(make_ticket(4))
        fleet.submit(make_ticket(5))
        wait_until(lambda: watch.ready.count("generator-0") == 2)
        fleet.submit(make_ticket(6))
        later = finish(fleet, 1)

    moved = {call.prompt[0] for call in leaving.samples()}
    assert [event.reason for event in lost(events)] == ["replica_lost"] * 2
    assert {event.replica for event in finished(events)} == {"generator-1"}
    assert numbers(events) == [0, 1, 2, 3]
    assert leaving.told("load", "label") == ["load base", "label 0", "load w2", "label 2"]
    assert moved <= {4, 5, 6}
    assert {event.replica for event in finished(later)} == {"generator-0"}
    assert {item.first_policy_version for event in finished(later) for item in event.group} == {2}


def test_a_server_that_comes_late_joins_with_the_newest_weights(servers: list[ScriptedServer], tmp_path: Path) -> None:
    early, late = servers
    late.go_away()

    with start_fleet(servers, tmp_path, num_ready=1) as fleet:
        fleet.submit(make_ticket(0))
        events = finish(fleet, 1)
        fleet.publish(make_update(tmp_path, 1))
        events += collect(fleet, is_published(1))
        early.otherwise = scripted.held
        late.come_back()
        for number in range(1, 6):
            fleet.submit(make_ticket(number))
        wait_until(late.samples)
        early.release()
        events += finish(fleet, 5)

    assert late.told("load", "label") == ["load base", "label 0", "load w1", "label 1"]
    assert numbers(events) == [0, 1, 2, 3, 4, 5]
    assert not lost(events)


def test_the_first_weights_are_loaded_once_by_a_server_that_joins(server: ScriptedServer, tmp_path: Path) -> None:
    with start_fleet([server], tmp_path) as fleet:
        fleet.submit(make_ticket(0))
        finish(fleet, 1)

    assert server.told("load", "label") == ["load base", "label 0"]


def test_the_first_weights_are_read_where_servers_started_elsewhere_see_them(
    server: ScriptedServer, tmp_path: Path
) -> None:
    with start_fleet([server], tmp_path, shared_model=tmp_path / "copy") as fleet:
        fleet.submit(make_ticket(0))
        finish(fleet, 1)

    assert server.told("load", "label") == ["load copy", "label 0"]


def test_a_server_that_somebody_left_paused_and_used_is_taken_over(server: ScriptedServer, tmp_path: Path) -> None:
    server.pause()

    with start_fleet([server], tmp_path) as fleet:
        fleet.submit(make_ticket(0))
        events = finish(fleet, 1)

    assert numbers(events) == [0]
    # Salts are versions, which another run had too: what it cached must not be read.
    assert FORGET in server.told()


def test_a_server_that_goes_away_while_it_joins_is_waited_for(server: ScriptedServer, tmp_path: Path) -> None:
    server.broken[scripted.LOAD] = scripted.closed

    with start_fleet([server], tmp_path, num_ready=0) as fleet:
        fleet.submit(make_ticket(0))
        wait_until(lambda: len(server.told("load")) >= 2)
        server.broken.clear()
        events = finish(fleet, 1)

    assert numbers(events) == [0]


def test_a_server_that_cannot_load_at_all_ends_the_run(server: ScriptedServer, tmp_path: Path) -> None:
    server.broken[scripted.LOAD] = scripted.sends(b"no such file", 500)

    with (
        start_fleet([server], tmp_path, num_ready=0) as fleet,
        pytest.raises(GeneratorError, match=rf"{server.url} answered 500: no such file"),
    ):
        finish(fleet, 1)


def test_what_is_no_vllm_server_is_waited_for(server: ScriptedServer, tmp_path: Path) -> None:
    server.broken[scripted.WEIGHT_INFO] = scripted.sends(b'{"status": "starting"}')

    with start_fleet([server], tmp_path, num_ready=0) as fleet:
        fleet.submit(make_ticket(0))
        wait_until(lambda: len(server.calls) >= 2)
        server.broken.clear()
        events = finish(fleet, 1)

    assert numbers(events) == [0]


def test_a_swap_that_was_given_up_does_not_disturb_the_next_one(server: ScriptedServer, tmp_path: Path) -> None:
    with start_fleet([server], tmp_path, heartbeat_timeout_s=2, request_timeout_s=3) as fleet:
        fleet.submit(make_ticket(0))
        finish(fleet, 1)
        server.hold_loads()
        fleet.publish(make_update(tmp_path, 1))
        wait_until(lambda: "load w1" in server.told())
        server.is_hung = True
        wait_until(lambda: [call for call in server.calls if call.path == "/gone" and "method" in call.body])
        server.calls.clear()
        server.release_loads()
        server.is_hung = False
        fleet.submit(make_ticket(1))
        events = finish(fleet, 1)

    assert server.told("load", "label") == ["load base", "label 0", "load w1", "label 1"]
    assert {item.first_policy_version for event in finished(events) for item in event.group} == {1}


# Servers that are started here.


def test_a_local_server_that_ends_is_started_again_with_the_newest_weights(
    server: ScriptedServer, tmp_path: Path
) -> None:
    with start_local_fleet(server, tmp_path) as fleet:
        fleet.submit(make_ticket(0))
        events = finish(fleet, 1)
        assert server.told("load", "label") == ["label 0"]  # it was started with the first weights
        fleet.publish(make_update(tmp_path, 1))
        events += collect(fleet, is_published(1))
        server.otherwise = scripted.held
        fleet.submit(make_ticket(1))
        wait_until(lambda: len(server.samples()) == 2)
        server.calls.clear()
        fleet.processes[0].stop()
        wait_until(lambda: len(fleet.processes) == 2)
        server.release()
        events += finish(fleet, 1)
        assert fleet.pids() == {"generator-0": fleet.processes[1].pid}

    assert numbers(events) == [0, 1]
    assert [(event.ticket.number, event.detail) for event in lost(events)] == [
        (1, "generator-0: ended with code 143")  # 128 + SIGTERM
    ]
    assert server.told("load", "label") == ["load w1", "label 1"]
    assert all(process.poll() is not None for process in fleet.processes)


def test_a_local_server_that_is_lost_over_and_over_ends_the_run(server: ScriptedServer, tmp_path: Path) -> None:
    server.otherwise = scripted.closed

    with start_local_fleet(server, tmp_path, max_restarts=2) as fleet:
        fleet.submit(make_ticket(0))
        with pytest.raises(GeneratorError, match=r"generator-0 is lost: (.|\n)* rl\.generator\.max_restarts=2"):
            finish(fleet, 1)

    assert len(fleet.processes) == 3


def test_a_completion_in_between_forgives_earlier_losses(server: ScriptedServer, tmp_path: Path) -> None:
    for number in range(4):
        server.script((number, 1), scripted.closed)

    with start_local_fleet(server, tmp_path, max_restarts=1) as fleet:
        for number in range(4):
            fleet.submit(make_ticket(number))
            finish(fleet, 1)

    assert len(fleet.processes) == 5


def test_a_local_server_that_ends_while_it_starts_ends_the_run_with_its_last_words(
    server: ScriptedServer, tmp_path: Path
) -> None:
    server.go_away()
    command = ("sh", "-c", "echo no such model; exit 3")

    with (
        start_local_fleet(server, tmp_path, command) as fleet,
        pytest.raises(GeneratorError, match=r"generator-0: vLLM ended while starting; .*\nno such model"),
    ):
        finish(fleet, 1)


def test_a_local_server_that_fails_at_its_first_sample_never_counts_as_ready(
    server: ScriptedServer, tmp_path: Path
) -> None:
    server.broken[scripted.GENERATE] = scripted.closed

    with (
        start_local_fleet(server, tmp_path) as fleet,
        pytest.raises(GeneratorError, match=r"generator-0: vLLM failed at its first sample: RemoteProtocolError"),
    ):
        finish(fleet, 1)

    assert server.told("load", "label") == []


def test_a_local_server_that_breaks_off_before_its_first_use_ends_the_run(
    server: ScriptedServer, tmp_path: Path
) -> None:
    server.broken[scripted.LABEL] = scripted.closed

    with (
        start_local_fleet(server, tmp_path) as fleet,
        pytest.raises(GeneratorError, match=r"generator-0: RemoteProtocolError .*generator-0\.log ends with"),
    ):
        finish(fleet, 1)


# When weights are swapped.


def test_drain_answers_what_came_before_a_publication_by_the_older_weights(
    server: ScriptedServer, tmp_path: Path
) -> None:
    with start_fleet([server], tmp_path) as fleet:
        fleet.submit(make_ticket(0))
        finish(fleet, 1)
        server.calls.clear()
        server.otherwise = scripted.held
        for number in (1, 2, 3):  # the third has no room yet
            fleet.submit(make_ticket(number))
        fleet.publish(make_update(tmp_path, 1))
        fleet.submit(make_ticket(4))
        fleet.publish(make_update(tmp_path, 2))
        fleet.submit(make_ticket(5))
        wait_until(lambda: len(server.samples()) == 2)
        server.release()
        events = finish(fleet, 5)

    sample = [scripted.GENERATE, "/answered"]
    told = server.told()
    assert sorted(told[:6]) == sorted(sample * 3)
    assert told[6:] == ["load w1", "label 1", *sample, "load w2", "label 2", *sample]
    versions = {
        event.ticket.number: {(item.first_policy_version, item.last_policy_version) for item in event.group}
        for event in finished(events)
    }
    assert versions == {1: {(0, 0)}, 2: {(0, 0)}, 3: {(0, 0)}, 4: {(1, 1)}, 5: {(2, 2)}}
    assert [event.policy_version for event in events if isinstance(event, Published)] == [1, 2]
    assert [call.body["cache_salt"] for call in server.samples()] == ["0", "0", "0", "1", "2"]


def test_drained_servers_swap_each_when_it_is_idle(servers: list[ScriptedServer], tmp_path: Path) -> None:
    slow = servers[0]
    slow.otherwise = scripted.held

    with start_fleet(servers, tmp_path) as fleet:
        for number in range(4):
            fleet.submit(make_ticket(number))
        fleet.publish(make_update(tmp_path, 1))
        fleet.submit(make_ticket(4))
        events = collect(fleet, lambda events: 4 in numbers(events))
        assert "load w1" not in slow.told()
        slow.release()
        events += collect(fleet, is_published(1, "generator-0"))

    versions = {event.ticket.number: event.group[0].last_policy_version for event in finished(events)}
    assert versions == {0: 0, 1: 0, 2: 0, 3: 0, 4: 1}
    assert slow.told()[-2:] == ["load w1", "label 1"]


def test_in_flight_freezes_what_runs_and_overtakes_what_waits(server: ScriptedServer, tmp_path: Path) -> None:
    with start_fleet([server], tmp_path, in_flight=True) as fleet:
        fleet.submit(make_ticket(0))
        finish(fleet, 1)
        server.calls.clear()
        server.otherwise = scripted.held
        for number in (1, 2, 3):  # the third has no room yet
            fleet.submit(make_ticket(number))
        wait_until(lambda: len(server.samples()) == 2)
        fleet.publish(make_update(tmp_path, 1))
        events = collect(fleet, is_published(1))
        server.release()
        events += finish(fleet, 3)

    told = server.told()
    assert told[2:6] == ["/pause?mode=keep&clear_cache=false", "load w1", "label 1", "/resume"]
    groups = {event.ticket.number: event.group for event in finished(events)}
    assert sorted(groups) == [1, 2, 3]
    assert {item.token_policy_versions for number in (1, 2) for item in groups[number]} == {(0, 1)}
    assert {(item.first_policy_version, item.last_policy_version) for item in groups[1]} == {(0, 1)}
    assert {(item.first_policy_version, item.token_policy_versions) for item in groups[3]} == {(1, ())}
    assert not lost(events)


def test_in_flight_recompute_forgets_keys_and_values_before_it_resumes(server: ScriptedServer, tmp_path: Path) -> None:
    with start_fleet([server], tmp_path, in_flight=True, kv_cache="recompute") as fleet:
        fleet.submit(make_ticket(0))
        finish(fleet, 1)
        server.otherwise = scripted.held
        fleet.submit(make_ticket(1))
        wait_until(lambda: len(server.samples()) == 2)
        server.calls.clear()
        fleet.publish(make_update(tmp_path, 1))
        collect(fleet, is_published(1))

    told = server.told()[:5]
    assert told[:3] == ["/pause?mode=keep&clear_cache=false", "load w1", "label 1"]
    assert told[3:] == [FORGET, "/resume"]


@pytest.mark.parametrize("in_flight", [False, True])
def test_salts_are_shared_by_a_version_when_drained_and_by_nobody_in_flight(
    server: ScriptedServer, tmp_path: Path, in_flight: bool
) -> None:
    server.script((0, 1), scripted.good, scripted.too_few_completions)

    with start_fleet([server], tmp_path, in_flight=in_flight) as fleet:
        for version in (0, 1):
            if version:
                fleet.publish(make_update(tmp_path, version))
                collect(fleet, is_published(version))
            for number in range(3):
                fleet.submit(make_ticket(number, SamplingPlan(1, with_greedy=True)))
            finish(fleet, 3)

    salts = [call.body["cache_salt"] for call in server.samples()]
    assert len(salts) >= 2 * 3 * 2 + 1
    if in_flight:
        assert len(set(salts)) == len(salts)
    else:
        assert set(salts) == {"0", "0-greedy", "1", "1-greedy"}


def test_publications_that_meet_a_busy_server_are_skipped_but_for_the_newest(
    server: ScriptedServer, tmp_path: Path
) -> None:
    with start_fleet([server], tmp_path) as fleet:
        fleet.submit(make_ticket(0))
        finish(fleet, 1)
        server.calls.clear()
        server.otherwise = scripted.held
        fleet.submit(make_ticket(1))
        updates = [make_update(tmp_path, version, is_temporary=True) for version in (1, 2, 3)]
        for update in updates:
            fleet.publish(update)
        wait_until(lambda: not updates[1].path.exists())
        assert updates[2].path.exists()
        server.release()
        collect(fleet, is_published(3))

    assert server.told("load") == ["load w3"]


# Weights that are not those that were published.


def test_a_server_that_forgets_its_label_is_not_used(servers: list[ScriptedServer], tmp_path: Path) -> None:
    forgetful, good = servers

    with start_fleet(servers, tmp_path) as fleet:
        fleet.submit(make_ticket(0))
        finish(fleet, 1)
        forgetful.mislabels = True
        fleet.publish(make_update(tmp_path, 1))
        for number in range(1, 7):
            fleet.submit(make_ticket(number))
        events = finish(fleet, 6)
        assert len(forgetful.samples()) <= 1
        forgetful.mislabels = False
        good.otherwise = scripted.silent
        for number in range(7, 10):
            fleet.submit(make_ticket(number))
        later = finish(fleet, 1)

    assert {event.replica for event in finished(events)} == {"generator-1"}
    assert {event.replica for event in events if isinstance(event, Published)} == {"generator-1"}
    assert {item.first_policy_version for event in finished(events) for item in event.group} == {1}
    assert {event.replica for event in finished(later)} == {"generator-0"}


def test_a_server_that_is_given_other_weights_by_somebody_is_brought_back(
    server: ScriptedServer, tmp_path: Path
) -> None:
    with start_fleet([server], tmp_path) as fleet:
        fleet.submit(make_ticket(0))
        finish(fleet, 1)
        server.version = "41"
        wait_until(lambda: server.told("load", "label") == ["load base", "label 0"] * 2)
        fleet.submit(make_ticket(1))
        events = finish(fleet, 1)

    assert {item.first_policy_version for event in finished(events) for item in event.group} == {0}


@pytest.mark.parametrize("when", ["it swaps", "it joins", "it comes back"])
@pytest.mark.parametrize("in_flight", [False, True])
def test_a_probe_that_does_not_match_ends_the_run(
    servers: list[ScriptedServer], tmp_path: Path, when: str, in_flight: bool
) -> None:
    wrong = servers[1]
    wrong.logprobs = {"w1": (-1.0, -2.0)}
    probe = Probe((1, 2, 3), (-1.0, -1.0))  # mean gap (0 + 1) / 2
    if when == "it joins":
        wrong.go_away()

    with start_fleet(servers, tmp_path, in_flight=in_flight, num_ready=1 if when == "it joins" else 2) as fleet:
        fleet.submit(make_ticket(0))
        finish(fleet, 1)
        if when == "it comes back":
            wrong.go_away()
        fleet.publish(make_update(tmp_path, 1, probe=probe))
        if when != "it swaps":
            collect(fleet, is_published(1))
            wrong.come_back()
        with pytest.raises(ProbeError, match=r"^generator-1 does not serve policy_version=1: .* by 0.500 nats"):
            collect(fleet, lambda _: False)


def test_an_update_that_a_server_says_it_has_loaded_and_has_not_ends_the_run(
    server: ScriptedServer, tmp_path: Path
) -> None:
    server.logprobs = {"w1": (-1.0, -1.0), "w2": (-1.2, -0.8)}

    with start_fleet([server], tmp_path) as fleet:
        fleet.submit(make_ticket(0))
        finish(fleet, 1)
        fleet.publish(make_update(tmp_path, 1, probe=Probe((1, 2, 3), (-1.0, -1.0))))
        collect(fleet, is_published(1))
        server.ignores_weights = True
        fleet.publish(make_update(tmp_path, 2, probe=Probe((1, 2, 3), (-1.2, -0.8))))
        with pytest.raises(ProbeError, match="it shows 0% of the change since policy_version=1"):
            collect(fleet, lambda _: False)


# Files.


def test_temporary_weights_are_deleted_once_nobody_loads_them(servers: list[ScriptedServer], tmp_path: Path) -> None:
    slow = servers[0]
    first, second, third = (make_update(tmp_path, version, is_temporary=version != 3) for version in (1, 2, 3))

    with start_fleet(servers, tmp_path) as fleet:
        slow.hold_loads()
        fleet.publish(first)
        collect(fleet, is_published(1, "generator-1"))
        wait_until(lambda: "load w1" in slow.told())
        fleet.publish(second)
        collect(fleet, is_published(2, "generator-1"))
        assert first.path.exists()  # superseded, and the slow one still loads it
        assert second.path.exists()

        slow.release_loads()
        collect(fleet, is_published(2, "generator-0"))
        wait_until(lambda: not first.path.exists())
        assert second.path.exists()

        fleet.publish(third)
        collect(fleet, is_published(3))
        wait_until(lambda: not second.path.exists())
        fleet.publish(make_update(tmp_path, 4))
        collect(fleet, is_published(4))

    assert third.path.exists()
    assert (tmp_path / "w4").exists()
    assert (tmp_path / "base").exists()


def test_temporary_weights_do_not_outlive_the_fleet(server: ScriptedServer, tmp_path: Path) -> None:
    loaded, waiting = (make_update(tmp_path, version, is_temporary=True) for version in (1, 2))

    with start_fleet([server], tmp_path) as fleet:
        fleet.publish(loaded)
        server.otherwise = scripted.held
        fleet.submit(make_ticket(0))
        fleet.submit(make_ticket(1))
        fleet.submit(make_ticket(2))  # has no room, and what comes after it waits with it
        fleet.publish(waiting)
        wait_until(lambda: len(server.samples()) == 2)
        assert loaded.path.exists()
        assert waiting.path.exists()

    assert not loaded.path.exists()
    assert not waiting.path.exists()


# The end.


@pytest.mark.parametrize("while_it", ["starts", "joins", "samples", "swaps", "is probed"])
def test_a_fleet_ends_although_a_server_hangs(server: ScriptedServer, tmp_path: Path, while_it: str) -> None:
    server.is_hung = while_it == "starts"
    if while_it == "joins":
        server.hold_loads()
    server.otherwise = scripted.silent

    with start_fleet([server], tmp_path, num_ready=int(while_it not in ("starts", "joins"))) as fleet:
        if while_it not in ("starts", "joins"):
            server.hold_loads()
            if while_it == "samples":
                fleet.submit(make_ticket(0))
            else:
                if while_it == "is probed":
                    server.release_loads()
                    server.broken[scripted.GENERATE] = scripted.silent
                fleet.publish(make_update(tmp_path, 1, probe=Probe((1, 2), (-1.0,))))
        waited_for = {"joins": "load base", "swaps": "load w1"}.get(while_it, scripted.GENERATE)
        wait_until(lambda: server.calls if while_it == "starts" else waited_for in server.told())

        closing = threading.Thread(target=fleet.close, daemon=True)
        closing.start()
        closing.join(10)
        assert not closing.is_alive()
        fleet.close()


def test_a_fleet_may_be_closed_twice_and_asked_for_nothing_after_it(server: ScriptedServer, tmp_path: Path) -> None:
    with start_fleet([server], tmp_path) as fleet:
        fleet.close()
        fleet.submit(make_ticket(0))

        assert fleet.wait(0.01) == []


# All together.


@pytest.mark.parametrize("in_flight", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_prompt_finishes_exactly_once_whatever_the_servers_do(
    servers: list[ScriptedServer], tmp_path: Path, in_flight: bool, seed: int
) -> None:
    draw = random.Random(seed)
    kinds = [*GONE.values(), *(UNUSABLE[kind] for kind in ("too few completions", "NaN", "HTTP 500"))]
    count, published = 60, 0
    for number in range(count):
        for server in servers:
            server.script((number, 1), *draw.choices([scripted.good, draw.choice(kinds)], [5, 1], k=3))
    events: list[Event] = []

    with start_fleet(servers, tmp_path, in_flight=in_flight, max_attempts=50, heartbeat_s=0.02) as fleet:
        for number in range(count):
            fleet.submit(make_ticket(number))
            if number % 10 == 9:
                published += 1
                fleet.publish(make_update(tmp_path, published, is_temporary=True))
                leaving = draw.choice(servers)
                leaving.go_away()
                events += fleet.wait(0.05)
                leaving.come_back()
        events += finish(fleet, count - len(finished(events)))
        events += fleet.wait(0.1)

    assert numbers(events) == list(range(count))
    attempts = {event.ticket.number: event.ticket.attempt for event in finished(events)}
    for number in range(count):
        tries = [event.ticket.attempt for event in lost(events) if event.ticket.number == number]
        assert tries == list(range(attempts[number]))
    versions = [item.last_policy_version for event in finished(events) for item in event.group]
    assert 0 <= min(versions) <= max(versions) <= published
    require_own_tokens(events)
    gc.collect()  # connections that were left open, while their warning is ignored


@pytest.mark.parametrize("meanwhile", [json.dumps({"urls": [None]}), "{"], ids=["nobody", "cannot be read"])
def test_another_server_takes_the_place_of_one_whose_address_is_looked_up(
    servers: list[ScriptedServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, meanwhile: str
) -> None:
    looks: list[str] = []

    def locate_and_note(address: str) -> str:
        looks.append(where.read_text())
        return locate(address)

    monkeypatch.setattr("stages.generation.replica.locate", locate_and_note)
    first, second = servers
    where = tmp_path / "generators.json"
    where.write_text(json.dumps({"urls": [first.url]}))
    first.otherwise = scripted.held

    with start_fleet([first], tmp_path, urls=(f"file:{where}#0",)) as fleet:
        fleet.submit(make_ticket(0))
        wait_until(first.samples)
        where.write_text(meanwhile)
        first.go_away()
        events = collect(fleet, lambda events: len(lost(events)) == 1)
        wait_until(lambda: looks.count(meanwhile) > 1)
        where.write_text(json.dumps({"urls": [second.url]}))
        events += finish(fleet, 1)

    assert [(event.ticket.number, event.ticket.attempt, event.replica) for event in finished(events)] == [
        (0, 1, "generator-0")
    ]
    assert second.told("load", "label") == ["load base", "label 0"]
    require_own_tokens(events)
