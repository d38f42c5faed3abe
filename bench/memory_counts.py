"""Bytes of tensors and seconds of phases, for memory.py. A storage counts once, however many tensors share it."""

import dataclasses
import statistics
import time
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

Storages = dict[int, int]
"""Bytes by address."""


def find_storages(tensors: Iterable[Any]) -> Storages:
    storages = [tensor.untyped_storage() for tensor in tensors if not tensor.is_meta]
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}


def sum_except(storages: Storages, *others: Storages) -> int:
    """Bytes of storages that are in none of the others."""
    return sum(size for key, size in storages.items() if not any(key in other for other in others))


def find_weights(model: Any) -> Storages:
    return find_storages([*model.parameters(), *model.buffers()])


def find_adamw(optimizer: Any) -> Any:
    """The one within DeepSpeed's optimizer, or which a single rank has by itself."""
    return getattr(optimizer, "optimizer", optimizer)


def find_moments(optimizer: Any) -> Storages:
    """AdamW's state."""
    return find_storages(list_tensors(list(find_adamw(optimizer).state.values())))


def find_gradients(engine: Any) -> Storages:
    """Whatever the optimizer and the parameters hold besides what they hold between updates."""
    parameters = list(engine.module.parameters())
    gradients = [getattr(item, name, None) for item in parameters for name in ("grad", "grad_accum")]
    held = find_storages([*list_tensors(engine.optimizer), *(item for item in gradients if item is not None)])
    groups = find_adamw(engine.optimizer).param_groups
    masters = find_storages(parameter for group in groups for parameter in group["params"])
    resting = find_weights(engine.module) | masters | find_moments(engine.optimizer)
    return {key: size for key, size in held.items() if key not in resting}


def list_tensors(thing: Any) -> list[torch.Tensor]:
    """Every tensor that an optimizer holds, however deep; models are left out."""
    found, seen, stack = [], set(), [thing]
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            found.append(item)
        elif not isinstance(item, torch.nn.Module):
            stack += _list_parts(item)
    return found


def _list_parts(item: Any) -> list[Any]:
    if isinstance(item, dict):
        return [*item.keys(), *item.values()]
    if isinstance(item, list | tuple | set):
        return list(item)
    is_optimizer = type(item).__module__.startswith(("deepspeed.runtime", "torch.optim"))
    return list(vars(item).values()) if is_optimizer and hasattr(item, "__dict__") else []


@dataclasses.dataclass(eq=False)
class _Saved:
    tensor: torch.Tensor


class SavedTensors:
    """Bytes of what autograd keeps for the backward pass, at their largest; parameters do not count."""

    def __init__(self, model: Any) -> None:
        self._parameters = find_storages(model.parameters())
        self._matrices = {tuple(sorted(item.shape)) for item in model.parameters() if item.requires_grad}
        self._holders: Counter[int] = Counter()
        self._sizes: Storages = {}
        self._casts: set[int] = set()
        self.peak = 0
        self.cast_weights = 0
        """The part of `peak` that is shaped like a trained matrix: its copy in the compute type."""

    def hooks(self) -> Any:
        """A context in which what is saved is counted until it is released."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda saved: saved.tensor)

    def _pack(self, tensor: torch.Tensor) -> _Saved:
        saved, storage = _Saved(tensor), tensor.untyped_storage()
        key = storage.data_ptr()
        if key not in self._parameters:
            self._hold(key, storage.nbytes(), is_cast=tuple(sorted(tensor.shape)) in self._matrices)
            weakref.finalize(saved, self._release, key)
        return saved

    def _hold(self, key: int, size: int, *, is_cast: bool) -> None:
        self._holders[key] += 1
        if self._holders[key] > 1:
            return
        self._sizes[key] = size
        if is_cast:
            self._casts.add(key)
        current = sum(self._sizes.values())
        if current > self.peak:
            self.peak = current
            self.cast_weights = sum(self._sizes[item] for item in self._casts)

    def _release(self, key: int) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            del self._sizes[key]
            self._casts.discard(key)


class ProcessMemory:
    """Memory of this process, in bytes: what is resident, or on a GPU what is allocated there."""

    def reset_peak(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # "reset the peak resident set size": man proc_pid_clear_refs

    def read_peak(self) -> int:
        """The largest since `reset_peak`."""
        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else self._read_status("VmHWM")

    def read_current(self) -> int:
        return torch.cuda.memory_allocated() if torch.cuda.is_available() else self._read_status("VmRSS")

    @staticmethod
    def _read_status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


class Watch:
    """Seconds and largest memory of the phases of each update."""

    def __init__(self) -> None:
        self._memory = ProcessMemory()
        self.rows: list[dict[str, float]] = []
        self.cpu_rows: list[dict[str, float]] = []
        """Of all threads; with one thread, what the phase takes on a core of its own."""
        self.peaks: dict[str, int] = {}

    def start_update(self) -> None:
        self.rows.append(defaultdict(float))
        self.cpu_rows.append(defaultdict(float))

    @contextmanager
    def phase(self, kind: str) -> Iterator[None]:
        self._memory.reset_peak()
        started, cpu_started = time.perf_counter(), time.process_time()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.rows[-1][kind] += time.perf_counter() - started
        self.cpu_rows[-1][kind] += time.process_time() - cpu_started
        self.peaks[kind] = max(self.peaks.get(kind, 0), self._memory.read_peak())

    def watch(self, inner: Any, method: str, kind: str) -> Any:
        """The same object, one of whose methods is a phase; None stays None."""
        return inner and _Watched(inner, method, self, kind)


@dataclasses.dataclass(frozen=True)
class _Watched:
    inner: Any
    method: str
    watch: Watch
    kind: str

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.inner, name)
        if name != self.method:
            return attribute

        def call(*arguments: Any) -> Any:
            with self.watch.phase(self.kind):
                return attribute(*arguments)

        return call


def find_medians(rows: list[dict[str, float]]) -> dict[str, float]:
    """Of each phase."""
    return {kind: round(statistics.median(row[kind] for row in rows), 4) for kind in rows[0]}
