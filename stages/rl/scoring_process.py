"""Runs in the process that `scoring.py` starts: reward model and reference, one group after the other."""

import contextlib
import hmac
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Client, Connection
from typing import Any

import torch

from stages.common.entry import EXIT_FAILED, run_entry
from stages.common.errors import RunError
from stages.common.guard import parse_cores
from stages.data.batches import collate, split_by_tokens
from stages.data.records import Completion
from stages.data.text import TokenSequence
from stages.generation.protocol import Group
from stages.models.load import load_frozen, select_device
from stages.rl.rollouts import Reference, build_rollout
from stages.rl.scorer import score_completions
from stages.rl.scoring import CORES_VARIABLE, KEY_HALF, KEY_VARIABLE, Failed, ScoredGroup, ScoringJob
from stages.scoring.load import load_scorer

logger = logging.getLogger(__name__)


class GroupScorer:
    """Does a job: loads its models, then computes what it names for each group alone."""

    def __init__(self, job: ScoringJob) -> None:
        self._job = job
        self._scorer = None if job.reward is None else load_scorer(job.reward, job.dtype, job.micro_batch_tokens)
        self._reference: Reference | None = None
        if job.sft is not None:
            model = load_frozen(job.sft, job.dtype)
            self._reference = Reference(model, job.dtype, job.temperature)

    def score(self, group: Group, with_reference: bool = True) -> ScoredGroup:
        """Scores of all completions, reference log-probabilities of those that are trained on."""
        scores: list[float] = []
        if self._scorer is not None:
            cut = self._job.algorithm.greedy_max_tokens
            scores = score_completions(self._scorer, group, self._job.missing_eos_score, greedy_max_tokens=cut)
        if self._reference is None or not with_reference:
            return ScoredGroup(tuple(scores), None)
        rows = self._select_rows(group, scores)
        logprobs = compute_reference_logprobs(self._reference, group, rows, self._job)
        return ScoredGroup(tuple(scores), logprobs)

    def _select_rows(self, group: Group, scores: Sequence[float]) -> list[int]:
        sampled = [row for row, completion in enumerate(group) if not completion.is_greedy]
        if self._scorer is None:
            return sampled
        units, _ = self._job.algorithm.select(build_rollout([group], scores))
        return sorted({row for unit in units for row in unit.rows})


def compute_reference_logprobs(
    reference: Reference, completions: Sequence[Completion], rows: Sequence[int], job: ScoringJob
) -> tuple[tuple[float, ...] | None, ...]:
    """The reference's log-probability of each token of the completions at `rows`, in nats; None for the others."""
    found: list[tuple[float, ...] | None] = [None] * len(completions)
    sequences = [TokenSequence(completions[row].prompt_ids, completions[row].token_ids) for row in rows]
    for part in split_by_tokens([len(sequence) for sequence in sequences], job.micro_batch_tokens):
        share_prompts = job.share_prompts and len(part) > 1
        batch = collate([sequences[index] for index in part], select_device(), share_prompts=share_prompts)
        logprobs = reference.compute(batch).tolist()  # [B, T]
        for index, values in zip(part, logprobs, strict=True):
            found[rows[index]] = tuple(values[: len(sequences[index].completion_ids)])
    return tuple(found)


def main() -> None:
    """Connect to the owner, load what its job names, answer group after group until it hangs up."""
    key = bytes.fromhex(os.environ.pop(KEY_VARIABLE))
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with Client(("127.0.0.1", int(sys.argv[1]))) as connection:
        connection.send_bytes(key[:KEY_HALF])
        if not hmac.compare_digest(connection.recv_bytes(KEY_HALF), key[KEY_HALF:]):
            raise RunError("whoever listens on the given port is not who started this process")
        _serve(connection)


def _serve(connection: "Connection[Any, Any]") -> None:
    try:
        scorer = GroupScorer(connection.recv())
        if CORES_VARIABLE in os.environ:
            keep_to(parse_cores(os.environ[CORES_VARIABLE]))
        connection.send(None)
        while True:
            connection.send(scorer.score(*connection.recv()))
    except (EOFError, ConnectionError):
        return  # the owner hung up
    except Exception as error:
        logger.exception("the owner is told that this failed")
        message = " ".join(f"{type(error).__name__}: {error}".split())
        connection.send(Failed(message, traceback.format_exc()))
        sys.exit(EXIT_FAILED)


def keep_to(cores: set[int]) -> None:
    """Have every thread of this process run on these CPU cores alone. Linux only; else nothing."""
    if sys.platform != "linux":
        return
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it has ended since
            os.sched_setaffinity(int(thread), cores)


if __name__ == "__main__":
    run_entry(main)
