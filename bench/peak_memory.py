"""The largest memory of a pipeline's processes, looked at once a second while it runs."""

import threading

import psutil

INTERVAL_S = 1.0
GIB = 2**30


class PeakMemory:
    """Memory of what this process has started, by stage, while this is open.

    Attributes:
        resident_gib: of one process, by `STAGE` or `STAGE/PROCESS`. Pages that processes share count in each.
        total_gib: of all processes of a stage at once, by stage; empty without `totals`. Shared pages count once
            (PSS of proc(5)), for which the kernel looks at every page: up to 20 ms of a core each time.
    """

    def __init__(self, *, totals: bool = False) -> None:
        self._totals = totals
        self.resident_gib: dict[str, float] = {}
        self.total_gib: dict[str, float] = {}
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        us = psutil.Process()
        while not self._is_over.wait(INTERVAL_S):
            for process in us.children(recursive=True):
                stage = _name(process)
                if stage.startswith("stages.") and stage.count(".") == 1:
                    self._look_at(stage.removeprefix("stages."), process)

    def _look_at(self, stage: str, process: psutil.Process) -> None:
        total = 0.0
        try:
            for one in (process, *process.children(recursive=True)):
                name = stage if one == process else f"{stage}/{_name(one)}"
                self.resident_gib[name] = max(self.resident_gib.get(name, 0.0), one.memory_info().rss / GIB)
                if self._totals:
                    total += one.memory_full_info().pss / GIB
        except psutil.Error:
            return  # one of them ended meanwhile
        if self._totals:
            self.total_gib[stage] = max(self.total_gib.get(stage, 0.0), total)


def _name(process: psutil.Process) -> str:
    """The module that it runs, or its own name."""
    try:
        words = process.cmdline()
        return words[words.index("-m") + 1] if "-m" in words[1:4] else process.name()
    except psutil.Error:
        return ""
