"""Ctrl-C and SIGTERM end a run in order: after the update at hand, with a checkpoint."""

import logging
import signal
import threading
import time
from types import FrameType
from typing import Any, Self

from stages.common.entry import EXIT_TERMINATED

logger = logging.getLogger(__name__)


class StopRequested(BaseException):
    """Somebody asked the run to end; it is raised where nothing is half done."""


SAME_S = 2.0
"""Signals this close together are one request: dvc's process group and dvc's end each bring one."""


class StopSignals:
    """Notes the first signal; a second one, a while later, takes effect at once. Main thread only."""

    def __init__(self) -> None:
        self._number: int | None = None
        self._noted_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def check(self) -> None:
        """Raise if the run is to end.

        Raises:
            StopRequested: a signal came.
        """
        if self._number is not None:
            raise StopRequested

    def leave(self) -> None:
        """End this process as the signal asked for.

        Raises:
            KeyboardInterrupt: it was Ctrl-C.
            SystemExit: it was SIGTERM.
        """
        if self._number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(EXIT_TERMINATED)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._number is None:
            logger.warning("asked to stop; ending after this update with a checkpoint, a second time ends at once")
            self._number, self._noted_at = number, time.monotonic()
        elif time.monotonic() - self._noted_at > SAME_S:
            before = self._before[number]
            if callable(before):
                before(number, frame)
            else:  # ignored, as Ctrl-C is in a shell's background, or the system's own
                self.leave()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
