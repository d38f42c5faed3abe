"""Progress of a long loop: a bar with the time left on a terminal, a line now and then in a log."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar, overload

from tqdm import tqdm

LOG_EVERY_S = 10.0

logger = logging.getLogger(__name__)

Item = TypeVar("Item")


@overload
def progress(items: int, description: str, unit: str = ...) -> Iterator[int]: ...
@overload
def progress(items: Iterable[Item], description: str, unit: str = ...) -> Iterator[Item]: ...
def progress(items: int | Iterable[Any], description: str, unit: str = "step") -> Iterator[Any]:
    """Yield the items (those of `range(items)` for a number) and show how far they are."""
    if isinstance(items, int):
        items = range(items)
    total = len(items) if isinstance(items, Sized) else None
    if sys.stderr.isatty():
        yield from tqdm(items, desc=description, total=total, unit=unit, dynamic_ncols=True)
        return
    started = last = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last >= LOG_EVERY_S:
            last = now
            logger.info(describe(description, done, total, unit=unit, elapsed_s=now - started))


def describe(description: str, done: int, total: int | None, *, unit: str, elapsed_s: float) -> str:
    """One line: how many, how fast, how long still."""
    rate = done / elapsed_s
    line = f"{description} {unit}s={done}"
    if total:
        line += f"/{total}"
    line += f" {unit}s_per_s={rate:.3g}"
    if total:
        line += f" left_s={(total - done) / rate:.0f}"
    return line
