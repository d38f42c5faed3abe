"""The other ranks' processes: what is said of one that ended, and that a hang with it does not last."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from stages.common.errors import RunError
from stages.common.process import GuardedProcess, start_guarded
from stages.learner.processes import Followers

TIMEOUT_S = 60


def start(log_path: Path, body: str) -> GuardedProcess:
    return start_guarded([sys.executable, "-c", body], log_path=log_path)


def test_work_with_a_rank_that_has_ended_is_refused_with_its_last_lines(tmp_path: Path) -> None:
    process = start(tmp_path / "rank1.log", "print('out of luck'); raise SystemExit(3)")
    followers = Followers([process])
    try:
        followers.wait()
        message = r"rank 1 ended with exit code 3; .*rank1.log:\nout of luck"
        with pytest.raises(RunError, match=message), followers.watched():
            pytest.fail("worked with a rank that has ended")
    finally:
        followers.kill()


def test_a_broken_connection_is_explained_by_the_rank_that_broke_it(tmp_path: Path) -> None:
    followers = Followers([start(tmp_path / "rank1.log", "import time; time.sleep(0.2)")])
    try:
        with pytest.raises(RunError, match=r"rank 1 ended with exit code 0"), followers.watched():
            raise RuntimeError("Connection closed by peer")
    finally:
        followers.kill()


def test_an_error_of_our_own_is_left_as_it_is() -> None:
    followers = Followers([])
    try:
        with pytest.raises(RuntimeError, match=r"out of memory"), followers.watched():
            raise RuntimeError("out of memory")
    finally:
        followers.kill()


def test_a_process_that_hangs_after_a_rank_has_died_ends_with_a_message(tmp_path: Path) -> None:
    script = textwrap.dedent(
        f"""
        import sys, time
        from pathlib import Path
        from stages.common.process import start_guarded
        from stages.learner import processes
        processes._GRACE_S = 0.2
        child = start_guarded([sys.executable, "-c", "import time; time.sleep(0.5); print('gone')"],
                              log_path=Path({str(tmp_path / "rank1.log")!r}))
        with processes.Followers([child]).watched():
            time.sleep({TIMEOUT_S})
        """
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=TIMEOUT_S)

    assert done.returncode == 1
    assert "rank 1 ended with exit code 0" in done.stderr
    assert done.stderr.endswith("gone\n")


def test_what_still_runs_is_killed(tmp_path: Path) -> None:
    process = start(tmp_path / "rank1.log", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)")
    followers = Followers([process])

    followers.kill()

    assert process.poll() is not None
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, signal.SIGTERM)
