"""A stand-in for the endpoints of a vLLM server that are used, over real HTTP, and as unreliable as it is told to be.

What it does to a prompt is scripted by the prompt's token ids; without a script it answers well. Every call is
recorded in the order of arrival. It runs in a thread of its own; its methods are for the test's thread.
"""

import asyncio
import contextlib
import json
import threading
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from stages.common.process import free_port

GENERATE = "/inference/v1/generate"
WEIGHT_INFO = "/weight_info"
LOAD = "/collective_rpc"
LABEL = "/update_weight_version"
EOS = 258


@dataclass(frozen=True)
class Call:
    """One request the server got; or `/answered`: it answers well; or `/gone`: the client did not wait for it."""

    path: str
    body: dict[str, Any]

    @property
    def prompt(self) -> tuple[int, ...]:
        return tuple(self.body["token_ids"])

    @property
    def is_load(self) -> bool:
        return self.path == LOAD and self.body["method"] == "load_published"

    def __str__(self) -> str:
        """In short: what is loaded, which label, or only the path."""
        if self.is_load:
            return f"load {str(self.body['kwargs']['path']).rpartition('/')[2]}"
        if self.path == LOAD:
            return str(self.body["method"])
        return f"label {self.body['new_version']}" if self.path == LABEL else self.path


@dataclass
class Exchange:
    """A request to sample, and the connection to answer it on."""

    server: "ScriptedServer"
    writer: asyncio.StreamWriter
    body: dict[str, Any]
    first_version: str

    def good_answer(self) -> dict[str, Any]:
        """Two tokens for each completion; the first is of the version at the start, the last of that at the end."""
        versions = [
            {"version": self.first_version, "start": 0, "end": 1},
            {"version": self.server.version, "start": 1, "end": 2},
        ]
        if self.first_version == self.server.version:
            versions = [{"version": self.first_version, "start": 0, "end": 2}]
        choices = [
            {
                "index": index,
                "token_ids": [(sum(self.body["token_ids"]) + index) % 256, EOS],
                "weight_versions": versions,
                "logprobs": {"content": [{"token_id": 0, "logprob": -0.5}, {"token_id": EOS, "logprob": -0.25}]},
            }
            for index in range(int(self.body["sampling_params"]["n"]))
        ]
        return {"choices": choices[::-1]}

    async def send_json(self, answer: Any, status: int = 200) -> None:
        await self.send(json.dumps(answer).encode(), status)

    async def send(self, body: bytes, status: int = 200, length: int | None = None) -> None:
        length = len(body) if length is None else length
        head = f"HTTP/1.1 {status} -\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n"
        self.writer.write(head.encode() + body)
        await self.writer.drain()


Answer = Callable[[Exchange], Awaitable[None]]


async def good(exchange: Exchange) -> None:
    exchange.server.calls.append(Call("/answered", exchange.body))
    await exchange.send_json(exchange.good_answer())


async def held(exchange: Exchange) -> None:
    """Answer well once `release` is called and the server is not paused."""
    await exchange.server.released.wait()
    await exchange.server.resumed.wait()
    await good(exchange)


async def too_few_completions(exchange: Exchange) -> None:
    await exchange.send_json({"choices": exchange.good_answer()["choices"][:-1]})


async def too_few_logprobs(exchange: Exchange) -> None:
    answer = exchange.good_answer()
    answer["choices"][0]["logprobs"]["content"].pop()
    await exchange.send_json(answer)


def wrong_logprob(value: float | None) -> Answer:
    async def answer_so(exchange: Exchange) -> None:
        answer = exchange.good_answer()
        answer["choices"][0]["logprobs"]["content"][0]["logprob"] = value
        await exchange.send_json(answer)

    return answer_so


async def aborted(exchange: Exchange) -> None:
    answer = exchange.good_answer()
    answer["choices"][0]["finish_reason"] = "abort"
    await exchange.send_json(answer)


def wrong_versions(*spans: tuple[Any, int, int]) -> Answer:
    async def answer_so(exchange: Exchange) -> None:
        answer = exchange.good_answer()
        answer["choices"][0]["weight_versions"] = [
            {"version": version, "start": start, "end": end} for version, start, end in spans
        ]
        await exchange.send_json(answer)

    return answer_so


def sends(body: bytes, status: int = 200) -> Answer:
    async def answer_so(exchange: Exchange) -> None:
        await exchange.send(body, status)

    return answer_so


async def truncated(exchange: Exchange) -> None:
    whole = json.dumps(exchange.good_answer()).encode()
    await exchange.send(whole[: len(whole) // 2], length=len(whole))
    exchange.writer.close()


async def closed(exchange: Exchange) -> None:
    exchange.writer.close()


async def silent(exchange: Exchange) -> None:
    """Never answer."""
    del exchange
    await asyncio.Event().wait()


async def dripping(exchange: Exchange) -> None:
    """A byte now and then, so that no single read takes long."""
    whole = json.dumps(exchange.good_answer()).encode()
    await exchange.send(b"", length=len(whole))
    for byte in whole:
        exchange.writer.write(bytes([byte]))
        await exchange.writer.drain()
        await asyncio.sleep(0.05)


@dataclass
class ScriptedServer:
    """One server on a port of its own. Use it as a context manager."""

    calls: list[Call] = field(default_factory=list)
    scripts: "defaultdict[tuple[int, ...], deque[Answer]]" = field(default_factory=lambda: defaultdict(deque))
    """Answers to a prompt's next requests; then `otherwise` holds."""
    otherwise: Answer = good
    version: str = "default"
    weights: str = ""
    """Name of the file that was loaded last."""
    mislabels: bool = False
    """Whether it forgets the versions it is told."""
    ignores_weights: bool = False
    """Whether it says it has loaded weights and has not."""
    is_hung: bool = False
    """Whether it takes requests and answers none, whatever they are."""
    broken: dict[str, Answer] = field(default_factory=dict)
    """What it does instead, by path."""
    logprobs: dict[str, Sequence[float]] = field(default_factory=dict)
    """Of the probe's tokens but the first, by name of the weights."""
    most_at_once: int = 0
    """Most sequences it was asked for at one time."""

    def __post_init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._sequences = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server: asyncio.Server | None = None
        self._connections: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self.released, self.resumed, self.loadable = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.resumed.set()
        self.loadable.set()

    def __enter__(self) -> "ScriptedServer":
        self.come_back()
        return self

    def __exit__(self, *_: object) -> None:
        self.go_away()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.run_until_complete(_end_tasks())
        self._loop.close()

    def script(self, prompt: tuple[int, ...], *answers: Answer) -> None:
        self.scripts[prompt].extend(answers)

    def release(self) -> None:
        """Let the held answers go."""
        self._do(_call(self.released.set))

    def pause(self) -> None:
        """As somebody would who went away before `/resume`."""
        self._do(_call(self.resumed.clear))

    def resume(self) -> None:
        self._do(_call(self.resumed.set))

    def hold_loads(self) -> None:
        self._do(_call(self.loadable.clear))

    def release_loads(self) -> None:
        self._do(_call(self.loadable.set))

    def go_away(self) -> None:
        """Refuse connections and drop those there are."""
        self._do(self._stop())

    def come_back(self) -> None:
        """Listen on the same port, as a server that was started anew."""
        self.version, self.weights = "default", "first"
        self._do(self._start())

    def told(self, *kinds: str) -> list[str]:
        """The calls in short, but for heartbeats; with `kinds` only those whose path or first word is one of them."""
        calls = [str(call) for call in self.calls if call.path != WEIGHT_INFO]
        return [call for call in calls if not kinds or call.split()[0] in kinds]

    def samples(self) -> list[Call]:
        """The requests to sample a prompt of the fleet's owner: no probe, no warm-up."""
        return [
            call
            for call in self.calls
            if call.path == GENERATE and "prompt_logprobs" not in _parameters(call) and not _is_warm_up(call)
        ]

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=10)

    # Everything below runs on the server's event loop.

    async def _start(self) -> None:
        self.resumed.set()
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", self.port)

    async def _stop(self) -> None:
        if self._server is not None:
            # What asyncio is just accepting would be left open by a close: it gets a few turns of the loop first.
            for listening in self._server.sockets:
                self._loop.remove_reader(listening)
            for _ in range(5):
                await asyncio.sleep(0)
            self._server.close()
            self._server = None
        tasks = list(self._connections)
        for task, writer in self._connections.items():
            writer.transport.abort()
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._connections[task] = writer
        task.add_done_callback(self._disconnect)

    def _disconnect(self, task: asyncio.Task[None]) -> None:
        self._connections.pop(task).close()
        if not task.cancelled():
            task.result()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while not writer.is_closing():
                call = await _read_call(reader)
                self.calls.append(call)
                answering = asyncio.ensure_future(self._answer(call, writer))
                await self._answer_unless_gone(answering, call, reader)

    async def _answer_unless_gone(
        self, answering: "asyncio.Task[None]", call: Call, reader: asyncio.StreamReader
    ) -> None:
        """A client says nothing before it has its answer, so anything that can be read is its going away."""
        gone = asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait({answering, gone}, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                answering.result()
            else:
                self.calls.append(Call("/gone", call.body))
                raise ConnectionError
        finally:
            answering.cancel()
            gone.cancel()
            await asyncio.gather(answering, gone, return_exceptions=True)

    async def _answer(self, call: Call, writer: asyncio.StreamWriter) -> None:
        exchange = Exchange(self, writer, call.body, self.version)
        if self.is_hung:
            await silent(exchange)
        if call.path in self.broken:
            await self.broken[call.path](exchange)
        elif call.path == GENERATE:
            await self._generate(exchange, call)
        elif call.path == WEIGHT_INFO:
            await exchange.send_json({"weight_version": self.version})
        else:
            await self._control(call)
            await exchange.send_json({"results": []})

    async def _control(self, call: Call) -> None:
        if call.is_load:
            await self.loadable.wait()
            if not self.ignores_weights:
                self.weights = str(call).removeprefix("load ")
        elif call.path == LABEL and not self.mislabels:
            self.version = call.body["new_version"]
        elif call.path.startswith("/pause"):
            self.resumed.clear()
        elif call.path == "/resume":
            self.resumed.set()

    async def _generate(self, exchange: Exchange, call: Call) -> None:
        if "prompt_logprobs" in _parameters(call):
            values = self.logprobs.get(self.weights, [-1.0] * (len(call.prompt) - 1))
            entries = [{str(token): {"logprob": x}} for token, x in zip(call.prompt[1:], values, strict=True)]
            await exchange.send_json({"prompt_logprobs": [None, *entries], "choices": []})
            return
        if _is_warm_up(call):
            await exchange.send_json({"choices": []})
            return
        script = self.scripts[call.prompt]
        answer = script.popleft() if script else self.otherwise
        self._sequences += _parameters(call)["n"]
        self.most_at_once = max(self.most_at_once, self._sequences)
        try:
            await self.resumed.wait()
            await answer(exchange)
        finally:
            self._sequences -= _parameters(call)["n"]


@contextlib.contextmanager
def scripted_servers(count: int) -> Iterator[list[ScriptedServer]]:
    """Some servers, ended when the block is left."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(ScriptedServer()) for _ in range(count)]


def _parameters(call: Call) -> dict[str, Any]:
    parameters: dict[str, Any] = call.body["sampling_params"]
    return parameters


def _is_warm_up(call: Call) -> bool:
    return call.body.get("cache_salt") == "warm-up"


async def _read_call(reader: asyncio.StreamReader) -> Call:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Call(head[0].split()[1], json.loads(body) if body else {})


async def _call(action: Callable[[], object]) -> None:
    action()


async def _end_tasks() -> None:
    """Cancel what is left on this loop and let transports close."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await asyncio.sleep(0.01)
