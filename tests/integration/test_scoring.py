"""The scoring process with two-layer models; only processes started here are signalled."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Client
from pathlib import Path
from queue import SimpleQueue

import psutil
import pytest
import torch

from stages.common.errors import RunError
from stages.data.batches import collate
from stages.data.records import Completion
from stages.data.text import TokenSequence
from stages.models.load import load_policy, load_tokenizer, save_model, select_device
from stages.models.reward_model import init_reward_model
from stages.rl.algorithm_config import RlooConfig
from stages.rl.algorithms import ALGORITHMS
from stages.rl.algorithms.online_dpo import OnlineDpo
from stages.rl.algorithms.policy_gradient import SUM
from stages.rl.algorithms.remax import Remax
from stages.rl.rollouts import Reference
from stages.rl.scorer import score_completions
from stages.rl.scoring import ProcessSettings, ScoredGroup, ScoringJob, ScoringProcess
from stages.rl.scoring_process import GroupScorer
from stages.scoring.reward import RewardScorer
from tests.fakes import make_completion
from tests.tiny import save_tiny_model

TIMEOUT_S = 60
TEMPERATURE = 0.7
MISSING_EOS_SCORE = -9.0
ONE_CORE = str(min(os.sched_getaffinity(0)))


@dataclass
class Results:
    """What a process delivered, in order."""

    queue: "SimpleQueue[tuple[int, ScoredGroup]]" = field(default_factory=SimpleQueue)
    failures: "SimpleQueue[RunError]" = field(default_factory=SimpleQueue)

    def add(self, key: int, scored: ScoredGroup) -> None:
        self.queue.put((key, scored))

    def take(self, num: int) -> list[tuple[int, ScoredGroup]]:
        taken = [self.queue.get(timeout=TIMEOUT_S) for _ in range(num)]
        assert self.queue.empty()
        return taken


@dataclass
class Running:
    """A process and what it delivers."""

    process: ScoringProcess
    results: Results

    def find_child(self, other_than: psutil.Process | None = None) -> psutil.Process:
        """What the guard guards."""
        found: list[psutil.Process] = []

        def look() -> bool:
            # The guard may end, or the next one start, while it is being looked at.
            with contextlib.suppress(psutil.NoSuchProcess):
                guard = self.process.pid
                found[:] = psutil.Process(guard).children() if guard else []
            return bool(found) and found[0] != other_than

        wait_for(look)
        return found[0]

    def find_port(self) -> int:
        """Where the process connects to. Before its exec it shows the guard's arguments, and during it none."""
        arguments: list[str] = []

        def look() -> bool:
            arguments[:] = self.find_child().cmdline()
            return arguments[1:-1] == ["-m", "stages.rl.scoring_process"]

        wait_for(look)
        return int(arguments[-1])


def wait_for(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not is_true():
        assert time.monotonic() < deadline, "timed out"
        threading.Event().wait(0.02)


def make_group(seed: int, *, finished: tuple[bool, ...] = (True, True, True, True)) -> tuple[Completion, ...]:
    """Random completions of different lengths."""
    draws = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 40, (len(finished),), generator=draws).tolist()
    tokens = [tuple(torch.randint(0, 256, (length,), generator=draws).tolist()) for length in lengths]
    return tuple(
        make_completion("", sample_index=index, finished=is_finished, token_ids=tokens[index])
        for index, is_finished in enumerate(finished)
    )


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> ScoringJob:
    directory = tmp_path_factory.mktemp("models")
    sft = save_tiny_model(directory / "sft")
    reward = directory / "reward"
    save_model(init_reward_model(sft, torch.float32, seed=1), load_tokenizer(sft), reward)
    return ScoringJob(
        reward=reward,
        sft=sft,
        algorithm=OnlineDpo(samples_per_prompt=4, beta=0.1, loss="sigmoid"),
        dtype="fp32",
        micro_batch_tokens=64,
        temperature=TEMPERATURE,
        missing_eos_score=MISSING_EOS_SCORE,
    )


@pytest.fixture(scope="module")
def running(job: ScoringJob, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    log_path = tmp_path_factory.mktemp("logs") / "scoring.log"
    settings = ProcessSettings(log_path, cores=ONE_CORE, timeout_s=10.0, max_restarts=3)
    results = Results()
    with ScoringProcess(job, settings, results.add, results.failures.put) as process:
        process.wait_until_ready()
        yield Running(process, results)


def score_here(job: ScoringJob, group: tuple[Completion, ...]) -> list[float]:
    assert job.reward is not None
    scorer = RewardScorer(job.reward, job.dtype, job.micro_batch_tokens)
    return score_completions(scorer, group, job.missing_eos_score)


def test_results_are_those_of_the_learners_process_to_the_last_digit(job: ScoringJob, running: Running) -> None:
    assert job.sft is not None
    groups = [make_group(0), make_group(1, finished=(True, False, True, True)), make_group(2)]
    reference = Reference(load_policy(job.sft, torch.float32), job.dtype, job.temperature)

    for key, group in enumerate(groups):
        running.process.submit(10 + key, group)
    delivered = running.results.take(3)

    assert [key for key, _ in delivered] == [10, 11, 12]
    here = GroupScorer(job)
    for group, (_, scored) in zip(groups, delivered, strict=True):
        assert scored == here.score(group)
        assert list(scored.scores) == score_here(job, group)
        keys = [(item.is_finished, score) for item, score in zip(group, scored.scores, strict=True)]
        pair = {keys.index(max(keys)), keys.index(min(keys))}
        assert scored.reference_logprobs is not None
        for row, logprobs in enumerate(scored.reference_logprobs):
            assert (logprobs is not None) == (row in pair)
            if logprobs is not None:
                sequence = TokenSequence(group[row].prompt_ids, group[row].token_ids)
                alone = reference.compute(collate([sequence], select_device()))[0]
                torch.testing.assert_close(torch.tensor(logprobs), alone.cpu())
    assert delivered[1][1].scores[1] == MISSING_EOS_SCORE


def test_the_process_keeps_to_its_cores(running: Running) -> None:
    child = running.find_child()

    assert {frozenset(os.sched_getaffinity(thread.id)) for thread in child.threads()} == {frozenset({int(ONE_CORE)})}
    assert child.environ()["OMP_NUM_THREADS"] == "1"


def test_threads_can_be_fewer_or_more_than_the_cores(job: ScoringJob, tmp_path: Path) -> None:
    results = Results()
    settings = ProcessSettings(tmp_path / "scoring.log", cores=ONE_CORE, num_threads=2)
    with ScoringProcess(job, settings, results.add, results.failures.put) as process:
        running = Running(process, results)
        running.find_port()  # it runs its own program by then

        assert running.find_child().environ()["OMP_NUM_THREADS"] == "2"


def test_a_killed_process_is_replaced_and_every_result_comes_once(job: ScoringJob, running: Running) -> None:
    groups = [make_group(seed) for seed in range(4)]
    first = running.find_child()

    first.send_signal(signal.SIGSTOP)  # so that it is killed with a group in its hands
    for key, group in enumerate(groups):
        running.process.submit(key, group)
    first.send_signal(signal.SIGKILL)

    delivered = running.results.take(4)
    assert [key for key, _ in delivered] == [0, 1, 2, 3]
    assert [list(scored.scores) for _, scored in delivered] == [score_here(job, group) for group in groups]
    assert running.find_child() != first


def test_a_hung_process_is_killed_and_every_result_comes_once(job: ScoringJob, running: Running) -> None:
    groups = [make_group(seed) for seed in range(3)]
    first = running.find_child()

    first.send_signal(signal.SIGSTOP)
    for key, group in enumerate(groups):
        running.process.submit(key, group)

    delivered = running.results.take(3)
    assert [key for key, _ in delivered] == [0, 1, 2]
    assert [list(scored.scores) for _, scored in delivered] == [score_here(job, group) for group in groups]
    assert not first.is_running()


def test_what_the_process_cannot_compute_ends_in_one_error(job: ScoringJob, tmp_path: Path) -> None:
    results = Results()
    settings = ProcessSettings(tmp_path / "scoring.log", cores=ONE_CORE)
    with ScoringProcess(job, settings, results.add, results.failures.put) as process:
        process.submit(0, [make_completion("", token_ids=(100_000,))])  # no such token
        process.submit(1, make_group(1))

        error = results.failures.get(timeout=TIMEOUT_S)

        first_line, *others = str(error).splitlines()
        assert first_line.startswith("the scoring process failed: IndexError: ")
        assert first_line.endswith("scoring.log has its log")
        assert any("stages/scoring/reward.py" in line for line in others)  # the traceback
        with pytest.raises(RunError, match="the scoring process failed: IndexError"):
            process.submit(2, make_group(1))
    assert results.failures.empty()
    assert results.queue.empty()


def test_a_process_that_keeps_dying_is_given_up(job: ScoringJob, tmp_path: Path) -> None:
    results = Results()
    settings = ProcessSettings(tmp_path / "scoring.log", cores=ONE_CORE, max_restarts=1)
    with ScoringProcess(job, settings, results.add, results.failures.put) as process:
        running = Running(process, results)
        first = running.find_child()
        first.kill()
        running.find_child(other_than=first).kill()

        with pytest.raises(RunError, match=r"exit code 137, 2 times in a row \(rl\..*=1\); .*scoring.log ends with:"):
            process.wait_until_ready()

        assert process.pid is None
    assert results.failures.get(timeout=TIMEOUT_S)


def test_a_stranger_who_connects_first_is_turned_away(job: ScoringJob, tmp_path: Path) -> None:
    results = Results()
    settings = ProcessSettings(tmp_path / "scoring.log", cores=ONE_CORE, max_restarts=0)
    with ScoringProcess(replace(job, sft=None), settings, results.add, results.failures.put) as process:
        running = Running(process, results)
        port = running.find_port()
        with Client(("127.0.0.1", port)) as stranger:
            stranger.send_bytes(b"x" * 32)
            with pytest.raises((EOFError, ConnectionError)):
                stranger.recv_bytes()

        process.wait_until_ready()


def test_closing_leaves_no_process(job: ScoringJob, tmp_path: Path) -> None:
    results = Results()
    process = ScoringProcess(job, ProcessSettings(tmp_path / "scoring.log"), results.add, results.failures.put)
    child = Running(process, results).find_child()

    process.submit(0, make_group(0))
    process.close()
    process.close()

    assert not child.is_running()
    assert results.queue.empty()
    assert results.failures.empty()


def test_the_reference_is_only_asked_about_what_is_trained_on(job: ScoringJob) -> None:
    samples = make_group(3, finished=(True, True))
    group = (*samples, replace(samples[0], is_greedy=True))
    algorithm = Remax(
        samples_per_prompt=2,
        kl_coef=0.1,
        kl_mode="full_step",
        correction={"kind": "none", "max_weight": 1.0},
        normaliser=SUM,
    )
    remax = replace(job, algorithm=algorithm)
    rloo = ALGORITHMS["rloo"](**RlooConfig(name="rloo").model_dump(exclude={"name"}))

    both = GroupScorer(remax).score(group)
    without_scores = GroupScorer(replace(remax, reward=None)).score(group)
    without_reference = GroupScorer(replace(job, sft=None)).score(group)
    tied = GroupScorer(job).score((samples[0],) * 4)
    evaluated = GroupScorer(replace(job, algorithm=rloo)).score(samples[:1], with_reference=False)

    assert both.reference_logprobs is not None
    assert [None if row is None else len(row) for row in both.reference_logprobs] == [
        *(len(item.token_ids) for item in samples),
        None,
    ]
    assert without_scores == ScoredGroup((), both.reference_logprobs)
    assert without_reference == ScoredGroup(both.scores, None)
    assert tied.reference_logprobs == (None,) * 4
    assert evaluated.scores == pytest.approx(both.scores[:1], abs=1e-5)
    assert evaluated.reference_logprobs is None
