"""Two and four real processes over gloo train as one does, whatever they share out, and go on as another number."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from stages.common.process import free_port
from stages.learner.ranks import ALONE
from tests import tiny_ranks, tiny_rl
from tests.integration.conftest import TIMEOUT_S, Project
from tests.tiny import save_tiny_model
from tests.tiny_ranks import Case, Found, name_checkpoint

LORA = {"lora": {"rank": 4}}
SHARED: list[Case] = [{"zero_stage": stage} | lora for lora in ({}, LORA) for stage in (0, 1, 2, 3)]
ON_TWO: list[Case] = [
    *SHARED,
    {"zero_stage": 2, "max_tokens": 1},  # seven micro-batches: one of the ranks repeats one of them
    {"zero_stage": 3, "is_shared": True},
    {"zero_stage": 3, "is_shared": True} | LORA,
    {"zero_stage": 3, "gradient_checkpointing": True},
    {"zero_stage": 3, "gradient_checkpointing": True} | LORA,
    {"zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
    {"zero_stage": 3, "resumed": name_checkpoint(2, {"zero_stage": 3})},  # what the ranks themselves have saved
    {"zero_stage": 2, "resumed": name_checkpoint(2, {"zero_stage": 2} | LORA)} | LORA,
    {"zero_stage": 0, "resumed": name_checkpoint(1, {})},  # of a single rank, which shares nothing out
]
RESUMED: list[Case] = [
    case | {"resumed": name_checkpoint(2, case)}
    for case in ({"zero_stage": 1}, {"zero_stage": 2} | LORA, {"zero_stage": 3})
]


def run_ranks(num_ranks: int, directory: Path, cases: list[Case]) -> list[Found]:
    done = start(["-m", tiny_ranks.__name__, str(num_ranks), str(directory), json.dumps(cases)])
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[Found] = torch.load(directory / f"found-{num_ranks}.pt")
    return found


def start(arguments: list[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    save_tiny_model(folder / "model")
    return folder


@pytest.fixture(scope="module")
def on_one_rank(directory: Path) -> dict[bool, Found]:
    """Without and with adapters."""
    cases: tuple[Case, ...] = ({}, LORA)
    return {"lora" in case: tiny_ranks.train(ALONE, directory, case) for case in cases}


@pytest.fixture(scope="module")
def on_two_ranks(directory: Path, on_one_rank: dict[bool, Found]) -> list[Found]:  # noqa: ARG001  it made the model
    return run_ranks(2, directory, ON_TWO)


@pytest.fixture(scope="module")
def on_four_ranks(directory: Path, on_two_ranks: list[Found]) -> list[Found]:  # noqa: ARG001  it saved checkpoints
    return run_ranks(4, directory, [*SHARED, *RESUMED])


def assert_same_training(found: Found, expected: Found) -> None:
    """The same trajectory in float32: sums over tokens and ranks are added up in another order."""
    steps = expected["metrics"][-len(found["metrics"]) :]
    for name in steps[0]:
        ours, theirs = ([step[name] for step in metrics] for metrics in (found["metrics"], steps))
        assert ours == pytest.approx(theirs, rel=1e-5), name
    assert found["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        # One in 256 of a value is the last digit of bf16.
        torch.testing.assert_close(found["weights"][name], weight, rtol=2**-7, atol=1e-4)
    assert found["trained"] == expected["trained"]
    for name in ("logprobs", "reference_logprobs", "frozen_logprobs", "frozen_kl"):
        ours, theirs = (sorted(torch.cat(item[name]).tolist()) for item in (found, expected))
        assert ours == pytest.approx(theirs, rel=1e-5), name


def test_one_rank_trains_as_it_does_with_its_state_in_parts(directory: Path, on_one_rank: dict[bool, Found]) -> None:
    assert_same_training(tiny_ranks.train(ALONE, directory, {"zero_stage": 2}), on_one_rank[False])


@pytest.mark.parametrize("number", range(len(ON_TWO)), ids=map(str, ON_TWO))
def test_two_ranks_train_as_one_does(on_two_ranks: list[Found], on_one_rank: dict[bool, Found], number: int) -> None:
    assert_same_training(on_two_ranks[number], on_one_rank["lora" in ON_TWO[number]])


def test_the_reference_is_shared_out_where_the_weights_are(on_two_ranks: list[Found]) -> None:
    cases = list(zip(SHARED, on_two_ranks, strict=False))
    held = {case["zero_stage"]: found["frozen_held"] for case, found in cases}
    left = [found["frozen_left"] for case, found in cases if case["zero_stage"] == 3]

    # 26,880 numbers in the tiny model; a shard may be a number longer than half.
    assert (held[0], held[2]) == (26_880, 26_880)
    assert 13_440 <= held[3] < 13_500
    assert left == [0, 0]


@pytest.mark.parametrize("number", range(len(SHARED)), ids=map(str, SHARED))
def test_four_ranks_train_as_one_does(on_four_ranks: list[Found], on_one_rank: dict[bool, Found], number: int) -> None:
    assert_same_training(on_four_ranks[number], on_one_rank["lora" in SHARED[number]])


@pytest.mark.parametrize("number", range(len(RESUMED)), ids=map(str, RESUMED))
def test_four_ranks_go_on_where_two_were_stopped(
    on_four_ranks: list[Found], on_one_rank: dict[bool, Found], number: int
) -> None:
    found = on_four_ranks[len(SHARED) + number]

    assert len(found["metrics"]) == 2  # the first of three updates was the two ranks'
    assert_same_training(found, on_one_rank["lora" in RESUMED[number]])


# The learner turns this off for its process, which a test's own filters undo.
@pytest.mark.filterwarnings("ignore:`torch.distributed:FutureWarning")
@pytest.mark.usefixtures("on_two_ranks")
@pytest.mark.parametrize("case", RESUMED[1:], ids=str)
def test_one_rank_goes_on_where_two_were_stopped(directory: Path, on_one_rank: dict[bool, Found], case: Case) -> None:
    found = tiny_ranks.train(ALONE, directory, case)

    assert_same_training(found, on_one_rank["lora" in case])


@pytest.mark.usefixtures("on_two_ranks")
@pytest.mark.parametrize("stage", [2, 3])
def test_a_checkpoint_of_adapters_holds_nothing_else(directory: Path, stage: int) -> None:
    saved = directory / name_checkpoint(2, {"zero_stage": stage} | LORA) / "learner"
    names = {
        name
        for path in saved.glob("*model_states.pt")
        for name in torch.load(path, map_location="cpu", weights_only=False)["module"]
    }

    assert names
    assert all(".lora_" in name for name in names)


def test_ranks_of_a_launcher_train_as_those_started_here(directory: Path, on_one_rank: dict[bool, Found]) -> None:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    launcher += [f"--master-port={free_port()}", "-m", tiny_ranks.__name__]

    done = start([*launcher, "2", str(directory), json.dumps([{"zero_stage": 3, "max_tokens": 24}])])

    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_training(torch.load(directory / "found-2.pt")[0], on_one_rank[False])


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_and_saves_that_rank_s_batch(tmp_path: Path) -> None:
    case = {"zero_stage": 2, "is_poisoned": True}

    done = start(["-m", tiny_ranks.__name__, "2", str(tmp_path), json.dumps([case])])

    assert done.returncode == 1
    saved = tmp_path / "failed_update_1_rank1.safetensors"
    assert f"update 1: loss is nan on rank 1; its batch is in {saved}; lower learner.lr=" in done.stderr
    assert "0.input_ids" in load_file(saved)


def test_sft_on_two_ranks_gives_the_model_of_one(finished: Project, copy_of_finished: Project) -> None:
    copy_of_finished.edit({"sft.learner.num_ranks": 2, "sft.learner.zero_stage": 3})

    copy_of_finished.run("stages.train_sft")

    assert_same_weights(finished, copy_of_finished, "sft")
    # Time differs, and so does what follows from it.
    for name in ("learner/loss", "learner/grad_norm", "sft/loss_per_token"):
        assert read_column(copy_of_finished, "sft", name) == pytest.approx(read_column(finished, "sft", name), rel=1e-4)


def test_rl_on_two_ranks_samples_scores_and_learns_as_on_one(finished: Project, copy_of_finished: Project) -> None:
    copy_of_finished.edit({"rl.learner.num_ranks": 2})

    copy_of_finished.run("stages.train_policy")

    assert_same_weights(finished, copy_of_finished, "policy_last")
    copy_of_finished.run("stages.rl.ledger", "check", "artifacts/ledger")


def test_rl_with_adapters_publishes_and_exports_plain_models(tmp_path: Path) -> None:
    learner = tiny_rl.SETTINGS["learner"] | {"lora": {"rank": 4, "targets": ["q_proj", "down_proj"]}, "lr": 0.01}

    result = tiny_rl.run(tmp_path, learner=learner, num_updates=3)

    before, after = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("sft", "out/policy_last")
    )
    changed = {name for name, weight in before.items() if not torch.equal(weight.bfloat16(), after[name].bfloat16())}
    assert before.keys() == after.keys()
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "down_proj"}
    # The generator takes the merged weights: else the probe of every version would have stopped the run.
    assert result.progress.last is not None
    assert result.progress.last.kl_nats != 0


def test_a_stage_whose_rank_is_killed_says_so_and_goes_on_with_fewer(copy_of_finished: Project) -> None:
    copy_of_finished.edit({"sft.learner.num_ranks": 2, "sft.num_epochs": 40, "sft.checkpoint_every": 10})
    started = subprocess.Popen(
        [sys.executable, "-m", "stages.train_sft"],
        cwd=copy_of_finished.path,
        env=copy_of_finished.environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for_checkpoint(copy_of_finished.path / ".slipstream/work/train_sft", started)
        children = psutil.Process(started.pid).children(recursive=True)
        follower = next(process for process in children if "-S" not in process.cmdline())
        os.kill(follower.pid, signal.SIGKILL)
        _, errors = started.communicate(timeout=TIMEOUT_S)
    finally:
        started.kill()
        started.wait(10)

    assert started.returncode == 1
    assert "rank 1 ended with exit code 137; the last checkpoint is kept" in errors
    assert "Traceback" not in errors
    _, alive = psutil.wait_procs(children, timeout=20)
    assert alive == []

    copy_of_finished.edit({"sft.learner.num_ranks": 1})
    assert "converting the checkpoint of 2 ranks for 1" in copy_of_finished.run("stages.train_sft").stderr


def wait_for_checkpoint(work: Path, stage: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 120
    while not any(work.glob("*/checkpoint/complete")):
        assert time.monotonic() < deadline, "no checkpoint appeared"
        assert stage.poll() is None, "the stage ended before its rank could be killed"
        time.sleep(0.01)


def assert_same_weights(expected: Project, found: Project, artifact: str) -> None:
    ours, theirs = (
        load_file(project.path / "artifacts" / artifact / "model.safetensors") for project in (found, expected)
    )
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        # As above; after a step of AdamW whose gradient is mere rounding, a weight may be off by lr.
        torch.testing.assert_close(ours[name], weight, rtol=2**-7, atol=2e-3)


def read_column(project: Project, stage: str, name: str) -> list[float]:
    lines = (project.path / f"plots/{stage}.csv").read_text().splitlines()
    place = lines[0].split(",").index(name)
    return [float(cells[place]) for line in lines[1:] if (cells := line.split(","))[place]]
