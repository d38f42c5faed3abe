import fcntl
import threading
from pathlib import Path

from flows.devices import lock_devices

TIMEOUT_S = 30


def is_free(path: Path) -> bool:
    """Whether another process could lock this."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def test_runs_with_a_device_in_common_take_turns_and_others_do_not(tmp_path: Path) -> None:
    has_begun, has_both = threading.Event(), threading.Event()

    def lock_both() -> None:
        has_begun.set()
        with lock_devices(["n1-gpu1", "n1-gpu0"], tmp_path):
            has_both.set()

    thread = threading.Thread(target=lock_both)
    with lock_devices(["n1-gpu0"], tmp_path):
        thread.start()
        assert has_begun.wait(TIMEOUT_S)
        with lock_devices(["n1-gpu2"], tmp_path):  # nobody has it
            assert [is_free(tmp_path / f"n1-gpu{number}.lock") for number in (0, 2, 3)] == [False, False, True]
            assert not has_both.wait(0.5)
    assert has_both.wait(TIMEOUT_S)
    thread.join(TIMEOUT_S)
