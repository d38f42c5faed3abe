"""A mini-batch spread over two real processes trains as it does in one."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from stages.common.process import free_port
from tests.unit.rl.algorithms import ranks
from tests.unit.rl.algorithms.cases import VARIANTS

TIMEOUT_S = 250
every_variant = pytest.mark.parametrize(
    "number", range(len(VARIANTS)), ids=[f"{name}-{number}" for number, (name, _) in enumerate(VARIANTS)]
)


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes computed; one pair of them for all tests of this file."""
    folder = tmp_path_factory.mktemp("ranks")
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    started = []
    for rank in ("0", "1"):
        with (folder / f"{rank}.log").open("w") as log:
            command = [sys.executable, "-m", ranks.__name__, str(folder / f"{rank}.pt")]
            env = {**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank}
            started.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(TIMEOUT_S) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait(10)
    assert codes == [0, 0], "\n".join((folder / f"{rank}.log").read_text()[-2000:] for rank in (0, 1))
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def trained_by_one() -> dict[int, dict[str, torch.Tensor]]:
    return ranks.train_shares(None, ranks.keep)


@every_variant
def test_the_shares_of_two_ranks_add_up_to_the_loss_and_gradient_of_one(
    on_two_ranks: list[dict[str, Any]], number: int
) -> None:
    alone = ranks.compute_shares(None, ranks.keep)

    for split in ranks.SPLITS:
        loss, gradient = alone[number, split]
        assert gradient.abs().sum() > 0
        for found in on_two_ranks:
            torch.testing.assert_close(found["shares"][number, split], (loss, gradient), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_the_pairs_of_offline_dpo_add_up_over_two_ranks(on_two_ranks: list[dict[str, Any]], kind: str) -> None:
    expected = ranks.compute_pair_shares(None, ranks.keep)[kind]

    for found in on_two_ranks:
        torch.testing.assert_close(found["pairs"][kind], expected, rtol=1e-10, atol=1e-10)


@every_variant
def test_an_update_of_the_learner_on_two_ranks_is_that_of_one(
    on_two_ranks: list[dict[str, Any]], trained_by_one: dict[int, dict[str, torch.Tensor]], number: int
) -> None:
    expected, (first, second) = trained_by_one[number], [found["trained"][number] for found in on_two_ranks]

    torch.testing.assert_close(first["loss"], expected["loss"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(first["grad_norm"], expected["grad_norm"], rtol=1e-5, atol=0)
    for name, value in expected.items():
        assert torch.equal(first[name], second[name]), name
        # AdamW's first step is lr times the gradient's sign, wherever that is more than rounding: lr is 1e-3.
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-5)
