"""How every stage starts and ends: logging, signals, and one plain line for what a person can fix.

Exit codes: 0 done, 1 the run failed, 2 a setting or an input file is wrong (running again will not help),
130 interrupted, 143 asked to stop.
"""

import ctypes
import errno
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

from stages.common.errors import InputError, RunError, SettingError

EXIT_FAILED = 1
EXIT_SETTING = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143

ENVIRONMENT_DEFAULTS = {
    # Each tool's own switch: DO_NOT_TRACK must be exactly "true" for one of them and "1" for another.
    "DVC_NO_ANALYTICS": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_MODEL_CATALOG_URI": "",  # MLflow's judges look a catalogue up on the internet otherwise
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "VLLM_NO_USAGE_STATS": "1",
    # A tokenizer that ran threads before a fork warns and may hang; batches here are small.
    "TOKENIZERS_PARALLELISM": "false",
    # Turns after which a thread that waits for the others of its process lets go of its core. OpenMP's own 300,000 keep
    # it from whoever the others wait for: beside other work an update takes 1.4 times as long then.
    "GOMP_SPINCOUNT": "2000",
}
"""Environment of every stage and of what it starts; a value that is set already wins."""

_PR_SET_PDEATHSIG = 1

_FULL_DISK_WORDS = (
    "no space left on device",  # safetensors and pyarrow
    "file too large",
    "pytorchstreamwriter failed writing file",  # torch
    "] . unexpected pos ",  # torch, closing a checkpoint whose last write was cut short
)
"""How libraries say so when they do not raise the system's own error."""

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No space, no quota left, or the file would exceed the limit on its size."""


def run_entry(main: Callable[[], None]) -> NoReturn:
    """Run a stage's `main` and leave with its exit code: `if __name__ == "__main__": run_entry(main)`."""
    for name, value in ENVIRONMENT_DEFAULTS.items():
        os.environ.setdefault(name, value)
    if not Path("/dev/nvidiactl").exists():
        # transformers imports DeepSpeed, which else warns on standard output that it found no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    _set_up_logging()
    if "DVC_STAGE" in os.environ:
        # Only under dvc: started by hand with nohup, a stage may outlive its shell.
        die_with_parent(signal.SIGTERM)
        _exit_if_orphaned()
    signal.signal(signal.SIGTERM, exit_on_sigterm)
    sys.exit(_run(main))


def die_with_parent(signal_number: signal.Signals) -> None:
    """Ask the kernel for this signal when the parent ends, even by SIGKILL. Linux only; else nothing."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal_number), 0, 0, 0)
    if os.getppid() != parent:  # it ended in between, so no signal will come
        os.kill(os.getpid(), signal_number)


def exit_on_sigterm(signal_number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    """Leave as after Ctrl-C, so that `finally` blocks run; a second SIGTERM does not disturb them."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit(EXIT_TERMINATED)


def _run(main: Callable[[], None]) -> int:
    try:
        main()
    except (SettingError, InputError) as error:
        return _say(str(error), EXIT_SETTING)
    except RunError as error:
        return _say(str(error), EXIT_FAILED)
    except KeyboardInterrupt:
        return _say("interrupted", EXIT_INTERRUPTED)
    # Libraries wrap a full disk in errors of their own, so the whole chain is looked at.
    except Exception as error:
        full_disk = _describe_full_disk(error)
        if full_disk is None:
            raise
        return _say(full_disk, EXIT_FAILED)
    return 0


def _say(message: str, exit_code: int) -> int:
    sys.stderr.write(f"{message}\n")
    return exit_code


def _set_up_logging() -> None:
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
        force=True,
    )
    # One line per HTTP request is what these call information.
    for chatty in ("httpx", "httpx2", "httpcore", "httpcore2", "openai", "urllib3", "alembic", "matplotlib"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def _exit_if_orphaned() -> None:
    """Leave if dvc was killed before this process could ask to be told."""
    if sys.platform != "linux" or os.getppid() != 1:
        return
    # In a container dvc itself may be process 1.
    if b"dvc" not in Path("/proc/1/cmdline").read_bytes():
        sys.exit(_say("dvc, which started this stage, is gone", EXIT_TERMINATED))


def _describe_full_disk(error: BaseException) -> str | None:
    """`no space left: PATH` if a full disk is behind this error."""
    for cause in _chain(error):
        if isinstance(cause, OSError) and cause.errno in _FULL_DISK:
            return f"no space left: {cause.filename or cause.filename2 or os.getcwd()}"
        if any(words in str(cause).lower() for words in _FULL_DISK_WORDS):
            return f"no space left: {os.getcwd()} ({type(cause).__name__}: {cause})"
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
