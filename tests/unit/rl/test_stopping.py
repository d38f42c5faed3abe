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


@pytest.mark.parametrize("before", [signal.SIG_IGN, signal.SIG_DFL])
def test_a_process_in_the_background_of_a_shell_ends_by_a_second_signal_too(
    monkeypatch: pytest.MonkeyPatch, before: signal.Handlers
) -> None:
    monkeypatch.setattr(stopping, "SAME_S", -1.0)
    ours = signal.signal(signal.SIGINT, before)
    try:
        with StopSignals():
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGINT, ours)
