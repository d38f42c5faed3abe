"""The asynchronous RL stage on two-layer models, with the exact generator: equalities of final weights, by sha256."""

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.common.errors import InputError, RunError
from stages.generation.protocol import SamplingPlan, WeightsUpdate, generate
from stages.generation.requests import make_requests
from stages.generation.start import ignore_span
from stages.generation.transformers_generator import TransformersGenerator
from stages.learner.engine import Learner
from stages.learner.weights import collect_trained, collect_weights
from stages.models.load import TrainableLayers, load_policy, load_tokenizer, select_trainable
from stages.rl.algorithms.online_dpo import OnlineDpo
from stages.rl.config import RlConfig
from stages.rl.ledger.checks.run import check_ledger
from stages.rl.ledger.reader import read_ledger
from stages.rl.mini_batch import Sampled
from stages.rl.prompts import PromptStream
from stages.rl.records import Totals
from stages.rl.rollouts import Budget, Lookups, Reference, build_micro_batches, build_rollout, compute_loss, split_units
from stages.rl.sampling import Sampling
from stages.rl.scorer import resolve_missing_eos_score, score_completions
from stages.rl.validation import Evaluation
from stages.scoring.reward import RewardScorer, read_sft_range
from tests import tiny_rl
from tests.processes import watched

TIMEOUT_S = 120
PPO = {
    "algorithm": {"name": "ppo", "samples_per_prompt": 3, "correction": {"kind": "decoupled"}},
    "max_staleness": 4,
    "updates_per_rollout": 1,
    "epochs_per_rollout": 2,
    "learner": tiny_rl.SETTINGS["learner"] | {"trainable_layers": 1},
}
"""Its ledger holds proximal log-probabilities and values, its checkpoint a second model with an optimizer, and
policy, reference and value model begin with the same frozen layer."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inputs")
    tiny_rl.make_inputs(directory)
    return directory


def copy_inputs(inputs: Path, target: Path) -> Path:
    shutil.copytree(inputs, target)
    return target


def trained_staleness(directory: Path) -> list[list[int]]:
    """Distinct staleness values of each update, from the published ledger."""
    updates = read_ledger(directory / "out/ledger").updates()
    return [sorted({row.staleness for row in update.rows}) for update in updates]


def read_kept(directory: Path) -> list[int]:
    """Versions in the published index."""
    versions: list[int] = json.loads((directory / "out/checkpoints/index.json").read_text())["policy_versions"]
    return versions


def train_synchronously(directory: Path, layers: TrainableLayers) -> dict[str, torch.Tensor]:
    """The plainest loop there is: sample, score, learn, publish; no queue, no admission, no ledger, no trunk."""
    config, generation = RlConfig.model_validate(tiny_rl.SETTINGS), tiny_rl.GENERATION
    paths = tiny_rl.make_inputs(directory)
    tokenizer = load_tokenizer(paths.sft)
    prompts, _ = make_requests(tiny_rl.read_prompt_list(directory), tokenizer, generation, config.seed)
    stream = PromptStream(prompts, config.seed)
    algorithm = OnlineDpo(samples_per_prompt=3, beta=0.1, loss="sigmoid")
    model = load_policy(paths.sft, torch.float32)
    select_trainable(model, layers, "rl.learner.trainable_layers")
    learner = Learner(model, config.learner, config.num_updates, directory)
    reference = Reference(load_policy(paths.sft, torch.float32), "fp32", generation.temperature)
    scorer = RewardScorer(paths.reward, "fp32", config.learner.micro_batch_tokens)
    missing_eos = resolve_missing_eos_score("lowest", read_sft_range(paths.reward))
    generator = TransformersGenerator(paths.sft, generation, tokenizer=tokenizer, policy_version=0, record=ignore_span)
    for update in range(config.num_updates):
        requests = [stream.get(number) for number in range(3 * update, 3 * update + 3)]
        groups = generate(generator, requests, SamplingPlan(3))
        completions = [completion for group in groups for completion in group]
        scores = score_completions(scorer, completions, missing_eos)
        units, _ = algorithm.select(build_rollout(groups, scores))
        tickets = [number for number, group in enumerate(groups) for _ in group]
        budget = Budget(config.learner.micro_batch_tokens, share_prompts=True)
        split = split_units(completions, tickets, units, [None] * len(completions), budget)
        loss = functools.partial(compute_loss, algorithm=algorithm, totals=Totals(len(units), 0), reference=reference)
        learner.update(build_micro_batches(split, Lookups(reference), share_prompts=True), loss)
        target = directory / f"sync-{update}"
        shutil.copytree(paths.sft, target)
        weights = load_file(paths.sft / "model.safetensors") | collect_trained(learner.model)
        save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
        generator.publish(WeightsUpdate(update + 1, target))
    generator.close()
    return collect_weights(learner.model)


@pytest.mark.parametrize("layers", ["all", 1])
def test_synchronous_settings_give_the_weights_of_a_plain_synchronous_loop(
    inputs: Path, tmp_path: Path, layers: TrainableLayers
) -> None:
    plain = train_synchronously(copy_inputs(inputs, tmp_path / "plain"), layers)
    directory = copy_inputs(inputs, tmp_path / "async")

    tiny_rl.run(directory, max_staleness=0, learner=tiny_rl.SETTINGS["learner"] | {"trainable_layers": layers})

    trained = load_file(directory / "out/policy_last/model.safetensors")
    assert plain.keys() == trained.keys()
    assert all(torch.equal(plain[name], trained[name]) for name in plain)
    assert trained_staleness(directory) == [[0]] * 6


@pytest.mark.parametrize(
    ("settings", "staleness"),
    [
        ({"max_staleness": 1}, [[0], [1], [1], [1], [1], [1]]),
        ({"max_staleness": 3}, [[0], [1], [2], [3], [3], [3]]),
        # U = 2: the first two rollouts come from version 0, then the j-th update trains data U + j old.
        ({"max_staleness": 3, "updates_per_rollout": 2}, [[0], [1], [2], [3], [2], [3]]),
        ({"max_staleness": 1, "epochs_per_rollout": 2}, [[0], [1]] * 3),
        ({"max_staleness": 4, "updates_per_rollout": 3}, None),
        (PPO, None),
    ],
)
def test_a_run_keeps_its_bound_and_its_ledger_replays_to_the_same_weights(
    inputs: Path, tmp_path: Path, settings: dict[str, Any], staleness: list[list[int]] | None
) -> None:
    settings = settings | {"keep_checkpoints": "all"}
    directory = copy_inputs(inputs, tmp_path / "run")
    tiny_rl.run(directory, **settings)
    again = copy_inputs(inputs, tmp_path / "replay")

    result = tiny_rl.run(again, **settings, replay_from=str(directory / "out/ledger"))

    assert staleness is None or trained_staleness(directory) == staleness
    assert [line for check in check_ledger(directory / "out/ledger") for line in check.violations] == []
    assert read_kept(directory) == [3, 6]
    for name in ("policy", "policy_last", "checkpoints/0003", "checkpoints/0006"):
        assert tiny_rl.hash_policy(again, name) == tiny_rl.hash_policy(directory, name)
    assert result.progress.staleness.total() == 6 * 9


LONG = {"num_updates": 24, "checkpoint_every": 1, "eval_every": 8, "keep_checkpoints": 2}
KILLED_AFTER = (2, 6, 10, 14, 19)
"""Updates; with four settings that is 20 kills."""


def start(directory: Path, settings: dict[str, Any]) -> AbstractContextManager["subprocess.Popen[str]"]:
    command = [sys.executable, "-m", "tests.tiny_rl", str(directory), json.dumps(settings)]
    return watched(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout_s=TIMEOUT_S, stderr=subprocess.PIPE)


def wait_for_update(process: "subprocess.Popen[str]", number: int) -> None:
    """Return once the run says that it made this update."""
    assert process.stderr is not None
    for line in process.stderr:
        if f"update={number}/" in line:
            return
    raise AssertionError(f"ended with {process.wait()} before update {number}")


@pytest.mark.parametrize(
    "settings",
    [
        {"max_staleness": 1},
        {
            **{"max_staleness": 3, "updates_per_rollout": 2, "score_on": "generator", "reference_on": "generator"},
            # It can choose nothing of the one completion of an evaluation, and is charged for its KL.
            "algorithm": {"name": "rloo", "samples_per_prompt": 2, "kl_coef": 0.05},
        },
        {"max_staleness": 6, "updates_per_rollout": 2, "epochs_per_rollout": 2},
        PPO,
    ],
    ids=["one step off", "scored by a process of its own", "two epochs, half a rollout further ahead", "ppo"],
)
def test_a_run_killed_at_random_instants_ends_with_the_weights_of_one_that_never_was(
    inputs: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    whole, killed = copy_inputs(inputs, tmp_path / "whole"), copy_inputs(inputs, tmp_path / "killed")
    tiny_rl.run(whole, **LONG, **settings)
    draws = random.Random(5)

    for update in KILLED_AFTER:
        with start(killed, LONG | settings) as process:
            wait_for_update(process, update)
            time.sleep(draws.uniform(0, 0.1))  # anywhere in the next updates
    tiny_rl.run(killed, **LONG, **settings)

    assert read_kept(killed) == [16, 24]
    for name in ("policy", "policy_last", "checkpoints/0016", "checkpoints/0024"):
        assert tiny_rl.hash_policy(killed, name) == tiny_rl.hash_policy(whole, name)
    assert [line for check in check_ledger(killed / "out/ledger") for line in check.violations] == []
    assert sum(event.kind == "resumed" for event in read_ledger(killed / "out/ledger").events) == len(KILLED_AFTER)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_asked_to_stop_leaves_a_checkpoint_of_its_last_update(
    inputs: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    # Most of its time is waiting for an evaluation: there the signal finds it.
    settings = LONG | {"max_staleness": 1, "checkpoint_every": 1000, "eval_every": 1}
    directory = copy_inputs(inputs, tmp_path / "run")
    with start(directory, settings) as process:
        wait_for_update(process, 5)
        process.send_signal(number)
        process.communicate()

    assert process.returncode == code
    state = json.loads((directory / "work/checkpoint/state.json").read_text())
    assert state["sampling"]["num_consumed"] >= 5 * 3
    updates = [recorded.update for recorded in read_ledger(directory / "work/ledger").updates()]
    assert tiny_rl.read_steps(directory) == [0, *(update + 1 for update in updates)]

    tiny_rl.run(directory, **settings)

    # The evaluation that was waited for is made up for: each version once.
    assert list(read_evaluations(directory)) == list(range(25))
    assert tiny_rl.read_steps(directory)[-1] == 24


def test_an_evaluation_that_a_stop_interrupted_is_made_up_for(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = copy_inputs(inputs, tmp_path / "whole"), copy_inputs(inputs, tmp_path / "stopped")
    take_evaluation, stops = Sampling.take_evaluation, [3, 6]

    def take_interrupted(self: Sampling, num_prompts: int, update: int) -> list[Sampled]:
        if update in stops:
            stops.remove(update)
            signal.raise_signal(signal.SIGTERM)
        return take_evaluation(self, num_prompts, update)

    tiny_rl.run(whole, max_staleness=1)
    monkeypatch.setattr(Sampling, "take_evaluation", take_interrupted)
    for _ in range(2):  # amid the run and at its end
        with pytest.raises(SystemExit):
            tiny_rl.run(stopped, max_staleness=1)
    tiny_rl.run(stopped, max_staleness=1)

    assert read_evaluations(stopped) == read_evaluations(whole)
    for name in ("policy", "policy_last"):
        assert tiny_rl.hash_policy(stopped, name) == tiny_rl.hash_policy(whole, name)


def test_a_run_stopped_amid_a_rollout_replaces_what_gave_no_signal_as_one_that_never_was(
    inputs: Path, tmp_path: Path
) -> None:
    # Two completions of three tokens at most: nearly every second pair has no end and no difference of scores.
    generation = tiny_rl.GENERATION.model_copy(update={"max_new_tokens": 3})
    settings = LONG | {
        **{"algorithm": {"name": "online_dpo", "samples_per_prompt": 2}, "prompts_per_update": 1},
        **{"max_staleness": 3, "updates_per_rollout": 4, "checkpoint_every": 1000, "eval_every": 24},
    }
    whole, stopped = copy_inputs(inputs, tmp_path / "whole"), copy_inputs(inputs, tmp_path / "stopped")
    tiny_rl.run(whole, generation, **settings)

    stops = (2, 5, 9, 14, 18, 21)
    for update in stops:
        with pytest.raises(SystemExit):
            tiny_rl.run(stopped, generation, stop_after=update, **settings)
    tiny_rl.run(stopped, generation, **settings)

    discarded = [event for event in read_ledger(stopped / "out/ledger").events if event.kind == "discarded"]
    after_stop = [event.update for event in discarded if any(0 <= event.update - stop < 4 - stop % 4 for stop in stops)]
    assert len(after_stop) > 2, "what was stopped has to sample replacements before its next rollout"
    assert tiny_rl.hash_policy(stopped) == tiny_rl.hash_policy(whole)
    for run in (whole, stopped):
        assert [line for check in check_ledger(run / "out/ledger") for line in check.violations] == []


def test_the_policy_is_the_version_of_highest_score_within_the_limit_of_kl(inputs: Path, tmp_path: Path) -> None:
    # Trained so hard that scores and KL go up and down.
    settings = {"num_updates": 8, "eval_every": 1, "learner": tiny_rl.SETTINGS["learner"] | {"lr": 0.01}}
    free, bound = copy_inputs(inputs, tmp_path / "free"), copy_inputs(inputs, tmp_path / "bound")

    tiny_rl.run(free, **settings)
    found = read_evaluations(free)
    best = max(found, key=lambda version: found[version].score)
    limit = found[best].kl_nats * 0.9
    tiny_rl.run(bound, **settings, max_kl_nats=limit)

    assert found[best].kl_nats > 0
    assert read_version(free) == best
    assert read_evaluations(bound) == found
    within = [version for version in found if found[version].kl_nats <= limit]
    assert read_version(bound) == max(within, key=lambda version: found[version].score) != best


def read_version(directory: Path) -> int:
    """Version of the published policy."""
    version: int = json.loads((directory / "out/policy/version.json").read_text())["policy_version"]
    return version


def read_evaluations(directory: Path) -> dict[int, Evaluation]:
    """By version, as the published ledger has them; each once."""
    events = [event for event in read_ledger(directory / "out/ledger").events if event.kind == "evaluated"]
    found = {event.policy_version: Evaluation.from_json(str(event.detail)) for event in events}
    assert len(found) == len(events)
    return found  # type: ignore[return-value]


def test_a_generator_that_does_not_sample_by_the_published_weights_ends_the_run(inputs: Path, tmp_path: Path) -> None:
    directory = copy_inputs(inputs, tmp_path / "run")

    with pytest.raises(RunError, match=r"above rl\.max_logprob_gap=1e-12: it does not sample from the"):
        tiny_rl.run(directory, max_logprob_gap=1e-12)


def test_a_reward_that_tells_nothing_apart_ends_the_run(
    inputs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = copy_inputs(inputs, tmp_path / "run")
    weights = load_file(directory / "reward/model.safetensors")
    weights["score.weight"] *= 0
    save_file(weights, directory / "reward/model.safetensors", metadata={"format": "pt"})
    # Nearly greedy: of a prompt all completions end, or none.
    generation = tiny_rl.GENERATION.model_copy(update={"max_new_tokens": 1, "temperature": 0.01})

    with pytest.raises(RunError, match="10 mini-batches in a row gave nothing to learn from"):
        tiny_rl.run(directory, generation)

    assert caplog.text.count("nothing to learn from these prompts") == 10
    # Also those of the last mini-batch, after which nothing was trained or saved.
    discarded = [event for event in read_ledger(directory / "work/ledger").events if event.kind == "discarded"]
    assert len(discarded) == 10 * tiny_rl.SETTINGS["prompts_per_update"]


def test_a_ledger_that_is_not_complete_is_not_replayed(inputs: Path, tmp_path: Path) -> None:
    directory = copy_inputs(inputs, tmp_path / "run")
    with pytest.raises(SystemExit):
        tiny_rl.run(directory, stop_after=4)

    with pytest.raises(InputError, match=r"holds 4 of rl\.num_updates=6 updates"):
        tiny_rl.run(copy_inputs(inputs, tmp_path / "replay"), replay_from=str(directory / "work/ledger"))


def test_a_ledger_of_other_settings_is_neither_resumed_nor_replayed(inputs: Path, tmp_path: Path) -> None:
    directory = copy_inputs(inputs, tmp_path / "run")
    tiny_rl.run(directory, max_staleness=1)

    with pytest.raises(InputError, match="seed is 0 there and 1 here"):
        tiny_rl.run(directory, max_staleness=1, seed=1)
    with pytest.raises(InputError, match="max_staleness is 1 there and 2 here"):
        tiny_rl.run(directory, max_staleness=2, replay_from=str(directory / "out/ledger"))
