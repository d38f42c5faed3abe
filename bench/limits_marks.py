"""One stage until its first useful work, for limits_start.py: who took which seconds of it, as a JSON line.

`python bench/limits_marks.py STAGE`, in the folder of the project. Only the main thread's time is shared out; every
second belongs to the innermost thing that went on: the import of a package, or one of `PARTS`.
"""

import builtins
import functools
import importlib.abc
import importlib.machinery
import json
import os
import runpy
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

ENTERED = time.time()
with open("/proc/uptime") as _uptime, open("/proc/self/stat") as _stat:
    # Field 22, counted from 1: when the process began, in ticks since the machine did.
    _age_s = float(_uptime.read().split()[0]) - int(_stat.read().rpartition(")")[2].split()[19]) / os.sysconf(
        "SC_CLK_TCK"
    )
BEGUN = time.time() - _age_s
"""When this process was started, in seconds of `time.time`."""

PARTS: dict[str, dict[str, str]] = {
    "stages.common.config": {"load_section": "settings", "read_params": "settings"},
    "stages.common.tracking": {"describe_stage": "tracking", "describe_pipeline": "tracking", "_start": "tracking"},
    "stages.common.hashing": {"hash_paths": "hashes"},
    "stages.models.load": {"load_policy": "models", "load_model": "models", "load_tokenizer": "tokenizer"},
    "stages.learner.engine": {"Learner.__init__": "DeepSpeed"},
    "stages.data.store": {"read_prompts": "data", "read_demonstrations": "data"},
    "stages.data.token_pairs": {"read_token_pairs": "data"},
    "stages.data.completion_store": {"read_completions": "data"},
}
"""Functions by module, and what their time is called."""
MARKS: dict[str, dict[str, str]] = {
    "stages.generation.replica": {"Replica.start": "server started", "Replica._warm_up": "server healthy"},
}
"""Functions whose first call is a moment to know, on whatever thread."""
FETCH = {
    "stages.generation.vllm_client": ("VllmClient._generate",),
    "stages.generation.transformers_generator": ("TransformersGenerator._generate_groups",),
}
"""Either is the first completion being asked for."""
WORK: dict[str, dict[str, tuple[str, ...]]] = {
    "prepare_model": {"stages.models.source": ("prepare_base_model",)},
    "prepare_data": {"stages.data.prepare": ("prepare_data",)},
    "train_sft": {"stages.sft.train": ("evaluate",)},
    "label_pairs": FETCH,
    "train_reward": {"stages.learner.engine": ("Learner.update",)},
    "train_policy": {**FETCH, "stages.rl.loop": ("Loop.run",)},
    "sample_policy": FETCH,
    "judge_policy": {"stages.judge.comparison": ("read_comparison",)},
}
"""Where useful work begins; in train_policy both with the learner's loop and with the first completion asked for."""


class Shares:
    """Exclusive seconds of the main thread, by name."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._open: list[str] = ["rest"]
        self._since = time.perf_counter()
        self._thread = threading.main_thread()

    def begin(self, name: str) -> None:
        """From here on all of the main thread's time is `name`'s, but for blocks within it."""
        self._settle()
        self._open.append(name)

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """What happens in the block is `name`'s, but for blocks within it."""
        if threading.current_thread() is not self._thread:
            yield
            return
        self.begin(name)
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    def close(self) -> dict[str, float]:
        """Seconds so far."""
        self._settle()
        return dict(self.seconds)

    def _settle(self) -> None:
        now = time.perf_counter()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now


SHARES = Shares()
MOMENTS: dict[str, float] = {}
"""Seconds since the process began."""
_import = builtins.__import__


def import_named(name: str, *scope: Any, **named: Any) -> ModuleType:
    """`import`, on the account of the package that is imported. Arguments are those of `__import__`."""
    level = named.get("level", scope[3] if len(scope) > 3 else 0)
    space = named.get("globals", scope[0] if scope else None) or {}
    package = (space.get("__package__") or "") if level else name
    with SHARES.of(f"import {package.partition('.')[0]}"):
        return _import(name, *scope, **named)


class Watcher(importlib.abc.MetaPathFinder):
    """Puts a clock into the functions of a module as soon as it has been read."""

    def __init__(self, stage: str) -> None:
        self._work = WORK[stage]
        self._is_asking = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name not in PARTS and name not in self._work and name not in MARKS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def run(module: ModuleType) -> None:
            execute(module)
            self._watch(module)

        spec.loader.exec_module = run  # type: ignore[method-assign]
        return spec

    def _watch(self, module: ModuleType) -> None:
        name = module.__name__
        for function, part in PARTS.get(name, {}).items():
            replace(module, function, lambda call, part=part: share(call, part))
        for function, moment in MARKS.get(name, {}).items():
            replace(module, function, lambda call, moment=moment: note(call, lambda: remember(moment)))
        for function in self._work.get(name, ()):
            kind = "learner ready" if function == "Loop.run" else "first work"
            replace(module, function, lambda call, kind=kind: note(call, lambda: self._reach(kind)))

    def _reach(self, kind: str) -> None:
        remember(kind)
        if kind == "learner ready":
            SHARES.begin("wait for the generator")
        if "first work" in MOMENTS and ("stages.rl.loop" not in self._work or "learner ready" in MOMENTS):
            finish()


def replace(module: ModuleType, function: str, wrap: Callable[[Any], Any]) -> None:
    owner, _, name = function.rpartition(".")
    holder = getattr(module, owner) if owner else module
    setattr(holder, name, wrap(getattr(holder, name)))


def share(call: Any, part: str) -> Any:
    """The function, on the account of `part`."""

    @functools.wraps(call)
    def run(*arguments: Any, **named: Any) -> Any:
        with SHARES.of(part):
            return call(*arguments, **named)

    return run


def note(call: Any, tell: Callable[[], None]) -> Any:
    """The function, announced each time before it is called."""

    @functools.wraps(call)
    def run(*arguments: Any, **named: Any) -> Any:
        tell()
        return call(*arguments, **named)

    return run


def remember(moment: str) -> None:
    MOMENTS.setdefault(moment, time.time() - BEGUN)


def finish() -> None:
    """Say what there is to say, and end as by a kill: guards end what was started."""
    report = {
        "moments": MOMENTS | {"processor": time.process_time()},
        "shares": SHARES.close() | {"interpreter": ENTERED - BEGUN},
    }
    os.write(1, (json.dumps(report) + "\n").encode())
    os._exit(0)


def main() -> None:
    stage = sys.argv[1]
    sys.path.insert(0, os.getcwd())
    sys.argv = sys.argv[1:]
    builtins.__import__ = import_named
    sys.meta_path.insert(0, Watcher(stage))
    runpy.run_module(f"stages.{stage}", run_name="__main__")


if __name__ == "__main__":
    main()
