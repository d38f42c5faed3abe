import os

import pytest
from hypothesis import settings

# Tiny models on many threads spend their time waiting for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# As `run_entry` does: DeepSpeed else warns on standard output that it found no GPU.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# How long an example takes says something about the machine alone.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
CORES = os.sched_getaffinity(0)


@pytest.fixture(autouse=True)
def all_cores() -> None:
    """A stage that ran in this process has bound it to the learner's cores."""
    os.sched_setaffinity(0, CORES)
