import pytest

from flows.dvc import Reproduction, allow_start, reproduce, stop_all
from stages.common.errors import RunError

OUTPUT = """\
Stage 'prepare_data' didn't change, skipping
Stage 'train_sft' is cached - skipping run, checking out outputs
Running stage 'train_policy':
> python -m stages.train_policy
rl.kl_coef=-1: must be at least 0
ERROR: failed to reproduce 'train_policy': failed to run: python -m stages.train_policy, exited with 2
"""


def test_dvc_says_what_it_did_and_why_it_failed() -> None:
    result = Reproduction()
    for line in OUTPUT.splitlines(keepends=True):
        result.read(line)

    assert (result.ran, result.skipped, result.restored) == (["train_policy"], ["prepare_data"], ["train_sft"])
    assert (result.failed, result.exit_code) == ("train_policy", 2)
    assert result.last_lines[-1] == "rl.kl_coef=-1: must be at least 0"


def test_nothing_starts_while_a_flow_is_being_stopped() -> None:
    stop_all()
    try:
        with pytest.raises(RunError, match="being stopped"):
            reproduce("train_sft")
    finally:
        allow_start()
