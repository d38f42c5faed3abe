"""`make chat`: talk to the policy in a terminal, or pipe lines into it.

A line is put into the task's form, so the policy sees what it was trained on; every line is a prompt of its own.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from stages.common.config import load_section
from stages.common.entry import run_entry
from stages.common.errors import InputError
from stages.data.config import DataConfig
from stages.generation.config import GenerationConfig

POLICY = Path("artifacts/policy")
SFT = Path("artifacts/sft")


def main() -> None:
    """Answer lines of standard input until it ends or says /quit."""
    generation = load_section("generation", GenerationConfig)
    task = load_section("data", DataConfig).task
    if not POLICY.is_dir():
        raise InputError(f"{POLICY}: no such model; run `make run` first")
    from stages.models.load import quiet_transformers, select_device
    from stages.release.conversation import HELP, Chat, Speaker

    quiet_transformers()
    device = select_device()
    chat = Chat(
        policy=Speaker(POLICY, generation, device),
        start_sft=lambda: Speaker(SFT, generation, device),
        make_messages=task.messages,
        temperature=generation.temperature,
        write=_write,
    )
    if sys.stdin.isatty():
        _write(f"{HELP}\n")
    for line in _read_lines(sys.stdin):
        if not chat.answer(line):
            break


def _read_lines(stdin: TextIO) -> Iterator[str]:
    """Lines as they are typed, with the terminal's line editing, or as they come through a pipe."""
    if not stdin.isatty():
        yield from stdin
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # arrow keys and history of `input`
    while True:
        try:
            yield input("> ")
        except EOFError:
            _write("\n")
            return


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    run_entry(main)
