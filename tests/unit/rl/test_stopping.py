import signal

import pytest

from stages.rl import stopping
from stages.rl.stopping import StopRequested, StopSignals


def test_a_second_signal_ends_at_once_unless_it_comes_with_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    with StopSignals() as stop:
        stop.check()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)  # of the same request
        with pytest.raises(StopRequested):
            stop.check()

        monkeypatch.setattr(stopping, "SAME_S", -1.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
