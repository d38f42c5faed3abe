"""The two sides of limits_generator.py: our fleet of one server, and vLLM's offline engine (limits_offline.py)."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from stages.generation.config import GenerationConfig
from stages.generation.protocol import (
    Event,
    Finished,
    Generator,
    Group,
    Published,
    Request,
    SamplingPlan,
    Ticket,
    WeightsUpdate,
)
from stages.generation.start import GeneratorSettings, start_generator
from stages.generation.vllm_server import ServerSettings, server_environment
from stages.models.load import load_tokenizer

AT_ONCE, WINDOW = "at once", "window"
STALL_S = 300.0
"""Seconds without any event after which the run is given up."""


class Side(Protocol):
    """An engine that is given a round's prompts."""

    @property
    def pid(self) -> int:
        """Of the process that has it, and of which all its others descend."""

    def sample(self, arm: str, requests: Sequence[Request], number: int) -> dict[str, Any]:
        """Seconds, and the token ids of every completion by prompt."""


class Served:
    """Our fleet of one server.

    Args:
        generator: its server is up.
        model: served; published again under another version before each round, so that no prefix is cached.
        plan: what is wanted of each prompt.
        batch: prompts of a mini-batch.
    """

    def __init__(self, generator: Generator, model: Path, plan: SamplingPlan, batch: int) -> None:
        self._generator = generator
        self._model = model
        self._plan = plan
        self._batch = batch

    @property
    def pid(self) -> int:
        """See `Side`."""
        return self._generator.pids()["generator-0"]

    def sample(self, arm: str, requests: Sequence[Request], number: int) -> dict[str, Any]:
        """See `Side`."""
        self._forget_prefixes(number)
        started = time.perf_counter()
        groups: dict[int, Group] = {}
        sent, window = 0, len(requests) if arm == AT_ONCE else 2 * self._batch
        while len(groups) < len(requests):
            done = next((index for index in range(len(requests)) if index not in groups), len(requests))
            allowed = len(requests) if arm == AT_ONCE else done // self._batch * self._batch + window
            while sent < min(allowed, len(requests)):
                self._generator.submit(Ticket(sent, requests[sent], self._plan))
                sent += 1
            finished = [event for event in self._wait() if isinstance(event, Finished)]
            groups |= {event.ticket.number: event.group for event in finished}
        seconds = time.perf_counter() - started
        ids = [[list(completion.token_ids) for completion in groups[index]] for index in range(len(requests))]
        return {"seconds": seconds, "ids": ids}

    def _forget_prefixes(self, number: int) -> None:
        """Give the same weights another version, which no cached prefix is used for."""
        if not number:  # the warm-up; a server that is still starting would not say that it has swapped
            return
        self._generator.publish(WeightsUpdate(number, self._model))
        while not any(isinstance(event, Published) for event in self._wait()):
            pass

    def _wait(self) -> list[Event]:
        events = self._generator.wait(STALL_S)
        if not events:
            raise SystemExit(f"nothing came from the server for {STALL_S:.0f} s; see its log")
        return events


@contextmanager
def start_served(model: Path, config: GenerationConfig, plan: SamplingPlan, batch: int, log: Path) -> Iterator[Served]:
    settings = GeneratorSettings(devices=(config.cpu_cores,))
    with start_generator(model, config, log_dir=log, settings=settings) as generator:
        yield Served(generator, model, plan, batch)


class Offline:
    """vLLM's offline engine, in a process of its own."""

    def __init__(self, process: "subprocess.Popen[str]", log: Path) -> None:
        self._process, self._log = process, log

    @property
    def pid(self) -> int:
        """See `Side`."""
        return self._process.pid

    def sample(self, arm: str, requests: Sequence[Request], number: int) -> dict[str, Any]:
        """See `Side`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        rows = [(list(request.prompt_ids), request.seed) for request in requests]
        self._process.stdin.write(json.dumps({"arm": arm, "requests": rows, "salt": str(number)}) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        last = self._log.read_text(errors="replace")[-2000:]
        raise SystemExit(f"vLLM's offline engine ended with code {self._process.wait()}:\n{last}")


@contextmanager
def start_offline(
    model: Path, config: GenerationConfig, plan: SamplingPlan, batch: int, log: Path
) -> Iterator[Offline]:
    job = {"model": str(model.resolve()), "config": config.model_dump(mode="json"), "batch": batch}
    job |= {"samples": plan.num_samples, "with_greedy": plan.with_greedy, "eos": load_tokenizer(model).eos_token_id}
    command = [sys.executable, str(Path(__file__).with_name("limits_offline.py")), json.dumps(job)]
    environment = os.environ | server_environment(config, ServerSettings(seed=0, devices=config.cpu_cores))
    with (log / "offline.log").open("w") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )
        try:
            yield Offline(process, log / "offline.log")
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(60)
            finally:
                process.kill()
