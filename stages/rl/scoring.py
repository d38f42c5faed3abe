"""Scores and reference log-probabilities from a process of its own, while the learner trains.

A thread here owns the process (`scoring_process.py`) and asks it one group after the other, in the order they were
submitted. Each group is a batch of its own, so its result does not depend on what else waits. A process that dies
or hangs is started again and asked for the same group again: each result is delivered once.
"""

import contextlib
import hmac
import logging
import os
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from stages.common.errors import RunError
from stages.common.guard import parse_cores
from stages.common.process import start_guarded
from stages.data.records import Completion
from stages.generation.protocol import Group
from stages.rl.algorithms.protocol import Algorithm

logger = logging.getLogger(__name__)

CORES_VARIABLE = "SLIPSTREAM_SCORING_CORES"
"""Environment variable with the cores that the process keeps to once it works."""
KEY_VARIABLE = "SLIPSTREAM_SCORING_KEY"
"""Environment variable with the secret, in hex. The process shows its first half, the owner answers with the second."""
KEY_HALF = 32
"""Bytes."""
_PROJECT = Path(__file__).resolve().parents[2]
_HELLO_S = 10.0
_LAST_WORDS_S = 2.0

T = TypeVar("T")


@dataclass(frozen=True)
class ScoringJob:
    """What is computed for each group, and with which models."""

    reward: Path | None
    """Reward model; None: no scores."""
    sft: Path | None
    """The reference; None: no log-probabilities."""
    algorithm: Algorithm
    """Says which completions are trained on; only those get reference log-probabilities."""
    dtype: Literal["bf16", "fp32"]
    """Compute type, the learner's."""
    micro_batch_tokens: int
    """Padded tokens of one forward pass."""
    temperature: float
    """Of sampling; the reference's logits are divided by it."""
    missing_eos_score: float
    """Score of unfinished completions."""
    share_prompts: bool = False
    """Whether the reference reads a prompt once for all its completions."""


@dataclass(frozen=True)
class ScoredGroup:
    """What was computed for one group; everything per completion, in the group's order."""

    scores: tuple[float, ...]
    """With the missing-EOS rule applied; empty if the job names no reward model."""
    reference_logprobs: tuple[tuple[float, ...] | None, ...] | None
    """One per token, in nats; None for completions that are not trained on, or if there is no reference for the group.
    Without scores it is not known which are trained on: then all sampled completions have them."""


@dataclass(frozen=True)
class Failed:
    """The process's answer if computing raised an exception."""

    message: str
    """One line."""
    traceback: str


@dataclass(frozen=True)
class ProcessSettings:
    """Where the process runs and how it is watched."""

    log_path: Path
    cores: str | None = None
    """CPU cores such as `0,2-3` that it keeps to from the moment its models are loaded; until then, and with None:
    ours. The generator is starting then, and the learner waits for it."""
    num_threads: int | None = None
    """None: as many as there are `cores`."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to our environment, such as CUDA_VISIBLE_DEVICES."""
    timeout_s: float = 120.0
    """Seconds one group may take, `rl.score_timeout_s`."""
    start_timeout_s: float = 300.0
    """Seconds until the models are loaded, `generation.start_timeout_s`."""
    max_restarts: int = 3
    """Times in a row it may be lost, without a result in between, and started again."""


class ScoringProcess:
    """Use it as a context manager, or call `close`.

    Args:
        job: what is computed.
        settings: where and how it runs.
        on_result: called with a group's key and its result, in a thread of ours.
        on_failure: called there at most once; no results come after it and `submit` raises the same error.
    """

    def __init__(
        self,
        job: ScoringJob,
        settings: ProcessSettings,
        on_result: Callable[[int, ScoredGroup], None],
        on_failure: Callable[[RunError], None],
    ) -> None:
        self._job = job
        self._settings = settings
        self._environment = _make_environment(settings)
        self._on_result = on_result
        self._on_failure = on_failure
        self._inbox: SimpleQueue[tuple[int, Group, bool] | None] = SimpleQueue()
        self._lock = threading.Lock()  # over `_child` and `_is_closed`: nothing is started once closed
        self._child: _Child | None = None
        self._is_closed = False
        self._num_losses = 0
        self._failure: RunError | None = None
        self._is_ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scoring", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int | None:
        """Pid of the guard of the running process, None between two of them."""
        child = self._child
        return None if child is None else child.process.pid

    def submit(self, key: int, group: Sequence[Completion], *, with_reference: bool = True) -> None:
        """Have a group scored; returns at once.

        Args:
            key: of its result.
            group: completions of one prompt.
            with_reference: whether it is trained on, as an evaluation's is not.

        Raises:
            RunError: no more groups can be scored.
        """
        if self._failure is not None:
            raise self._failure
        self._inbox.put((key, tuple(group), with_reference))

    def wait_until_ready(self) -> None:
        """Return when the models are loaded.

        Raises:
            RunError: they cannot be.
        """
        self._is_ready.wait()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """End the process; groups without a result get none. May be called twice."""
        with self._lock:
            self._is_closed = True
            child = self._child
        self._inbox.put(None)
        if child is not None:
            child.kill()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        try:
            self._insist(_Child.load)
            self._is_ready.set()
            while (item := self._inbox.get()) is not None:
                self._answer(*item)
        except _ClosedError:
            pass
        except RunError as error:
            self._fail(error)
        except Exception as error:  # a bug; without a word of it whoever waits for results would wait for ever
            self._fail(RunError(f"the thread of the scoring process ended: {error!r}"))
            raise
        finally:
            if self._child is not None:
                self._child.end()
            self._child = None
            self._is_ready.set()

    def _fail(self, error: RunError) -> None:
        self._failure = error
        self._on_failure(error)

    def _answer(self, key: int, group: Group, with_reference: bool) -> None:
        result = self._insist(lambda child: child.score(group, with_reference))
        self._num_losses = 0
        self._on_result(key, result)

    def _insist(self, action: Callable[["_Child"], T]) -> T:
        """What a process answers, however many of them it takes."""
        while True:
            try:
                return action(self._child or self._spawn())
            except _LostError:
                self._bury()

    def _spawn(self) -> "_Child":
        with self._lock:
            if self._is_closed:
                raise _ClosedError
            try:
                self._child = _Child(self._job, self._settings, self._environment)
            except OSError as error:
                raise RunError(f"the scoring process cannot be started: {error}") from error
            return self._child

    def _bury(self) -> None:
        assert self._child is not None
        child, self._child = self._child, None
        how = child.end()
        if self._is_closed:
            raise _ClosedError
        self._num_losses += 1
        if self._num_losses > self._settings.max_restarts:
            raise RunError(
                f"the scoring process {how}, {self._num_losses} times in a row "
                f"(rl.generator.max_restarts={self._settings.max_restarts}); {child.describe_log()}"
            )
        restarts = f"{self._num_losses}/{self._settings.max_restarts}"
        logger.warning("the scoring process %s, starting it again restart=%s", how, restarts)


class _LostError(Exception):
    """The process died, or hung and was killed."""


class _ClosedError(Exception):
    """`close` was called."""


class _Child:
    """One life of the process. Only `kill` may be called from other threads."""

    def __init__(self, job: ScoringJob, settings: ProcessSettings, environment: Mapping[str, str]) -> None:
        self._job = job
        self._settings = settings
        self._key = secrets.token_bytes(2 * KEY_HALF)
        self._connection: Connection[Any, Any] | None = None
        self._exceeded = ""
        self._server = socket.create_server(("127.0.0.1", 0))
        self._server.settimeout(0.2)
        port = str(self._server.getsockname()[1])
        try:
            self.process = start_guarded(
                [sys.executable, "-m", "stages.rl.scoring_process", port],
                env={**environment, KEY_VARIABLE: self._key.hex()},
                log_path=settings.log_path,
            )
        except BaseException:
            self._server.close()
            raise

    def load(self) -> None:
        """Wait until its models are loaded."""
        if self._connection is None:
            with self._deadline("generation.start_timeout_s", self._settings.start_timeout_s):
                self._connection = self._accept()
                self._ask(self._connection, self._job)

    def score(self, group: Group, with_reference: bool) -> ScoredGroup:
        """What it answers for a group."""
        self.load()
        assert self._connection is not None
        with self._deadline("rl.score_timeout_s", self._settings.timeout_s):
            scored: ScoredGroup = self._ask(self._connection, (group, with_reference))
        return scored

    def kill(self) -> None:
        """End it at once, even if it is stopped; whoever waits for its answer is told that it is lost."""
        self.process.stop(timeout_s=0.0)

    def end(self) -> str:
        """Leave no trace of it but the log; how it ended, in words."""
        code = self.process.stop(_LAST_WORDS_S)
        self._server.close()
        if self._connection is not None:
            self._connection.close()
        if self._exceeded:
            return f"gave no answer within {self._exceeded} s"
        return f"ended with exit code {code}"

    def describe_log(self) -> str:
        """Its last lines, for a message."""
        return f"{self._settings.log_path} ends with:\n{self.process.tail(20)}"

    def _accept(self) -> "Connection[Any, Any]":
        while self.process.poll() is None:
            try:
                accepted, _ = self._server.accept()
            except TimeoutError:
                continue
            connection: Connection[Any, Any] = Connection(accepted.detach())
            if self._is_ours(connection):
                self._server.close()
                return connection
            connection.close()
        raise _LostError

    def _is_ours(self, connection: "Connection[Any, Any]") -> bool:
        """Both sides show that they know the secret before either unpickles what the other sends."""
        try:
            hello = connection.recv_bytes(KEY_HALF) if connection.poll(_HELLO_S) else b""
            if not hmac.compare_digest(hello, self._key[:KEY_HALF]):
                return False
            connection.send_bytes(self._key[KEY_HALF:])
        except (EOFError, OSError):
            return False
        return True

    def _ask(self, connection: "Connection[Any, Any]", message: ScoringJob | tuple[Group, bool]) -> Any:
        try:
            connection.send(message)
            answer = connection.recv()
        except (EOFError, OSError) as error:
            raise _LostError from error
        if isinstance(answer, Failed):
            where = f"{self._settings.log_path} has its log"
            raise RunError(f"the scoring process failed: {answer.message}; {where}\n{answer.traceback}")
        return answer

    @contextlib.contextmanager
    def _deadline(self, setting: str, timeout_s: float) -> Iterator[None]:
        """Kill the process if the block takes longer: whatever the block waits for then ends."""
        timer = threading.Timer(timeout_s, self._expire, [f"{setting}={timeout_s:g}"])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _expire(self, limit: str) -> None:
        self._exceeded = limit
        self.kill()


def _make_environment(settings: ProcessSettings) -> dict[str, str]:
    paths = [str(_PROJECT), os.environ.get("PYTHONPATH", "")]
    # It is not one of the learner's ranks: it takes the first of the devices it is shown.
    ours = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "LOCAL_RANK": "0"}
    if settings.cores is not None:
        num_threads = settings.num_threads or len(parse_cores(settings.cores))
        ours |= {"OMP_NUM_THREADS": str(num_threads), CORES_VARIABLE: settings.cores}
    return {**os.environ, **ours, **settings.env}
