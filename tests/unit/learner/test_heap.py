"""Memory that is freed is kept, unless whoever started the process says what glibc is to do."""

import os
import platform
import subprocess
import sys
import textwrap

import pytest

PAGES = 64 * 2**20 // os.sysconf("SC_PAGE_SIZE")
"""Of the tensor below."""
FILL_AGAIN = """
    import resource
    import torch
    from stages.learner.heap import keep_freed_memory

    keep_freed_memory()
    for _ in range(20):  # glibc's cache of small blocks keeps the first few apart
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        tensor = torch.ones(64 * 2**20, dtype=torch.uint8)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        del tensor
    print(after - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's own settings")
@pytest.mark.parametrize(
    ("variables", "is_kept"),
    [({}, True), ({"MALLOC_ARENA_TEST": "8"}, False), ({"GLIBC_TUNABLES": "glibc.malloc.arena_test=8"}, False)],
)
def test_a_tensor_takes_the_place_of_one_that_was_freed(variables: dict[str, str], *, is_kept: bool) -> None:
    unset = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", textwrap.dedent(FILL_AGAIN)]
    done = subprocess.run(
        command,
        env=unset | variables | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    new_pages = int(done.stdout)
    assert new_pages < PAGES / 10 if is_kept else new_pages >= PAGES
