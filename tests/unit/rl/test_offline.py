from pathlib import Path
from typing import Any

import pytest

from stages.common.errors import InputError
from stages.data.token_pairs import TokenPair, write_token_pairs
from stages.learner.config import LearnerConfig
from stages.rl.config import DpoConfig, RlConfig
from stages.rl.offline import OfflineInputs, OfflineProgress, PairEvaluation, list_unused, train_offline
from stages.rl.timeline import Timeline
from stages.rl.train import PolicyOutputs
from tests.architecture.imports import imported_files


def make_config(**algorithm: Any) -> RlConfig:
    return RlConfig(
        algorithm=DpoConfig(name="dpo", **algorithm),
        learner=LearnerConfig(lr=1e-4),
        num_updates=4,
        prompts_per_update=2,
        max_staleness=0,
    )


def test_no_generator_no_server_and_no_scorer_is_within_reach() -> None:
    files = imported_files(Path("stages/rl/offline.py"))

    reached = {file.as_posix() for file in files if file.parts[1] in ("generation", "scoring")}
    assert reached <= {f"stages/generation/{name}.py" for name in ("__init__", "config", "engine_args", "protocol")}


def test_settings_of_sampling_are_named_as_without_effect_and_no_other() -> None:
    unused = list_unused()

    assert {"rl.max_staleness", "rl.updates_per_rollout", "rl.generator", "rl.score_on", "rl.max_kl_nats"} <= set(
        unused
    )
    assert {"rl.learner", "rl.num_updates", "rl.prompts_per_update", "rl.eval_every", "rl.seed"}.isdisjoint(unused)


def test_the_best_version_is_the_one_of_lowest_validation_loss() -> None:
    progress = OfflineProgress()

    kept = [
        progress.note(PairEvaluation(version, loss, 0.5, 0.0))
        for version, loss in enumerate([0.7, 0.5, 0.6, 0.5, 0.4, 0.9])
    ]

    assert kept == [True, True, False, False, True, False]  # of equal ones the earlier
    assert progress.first is not None
    assert progress.best is not None
    assert progress.last is not None
    versions = (progress.first.policy_version, progress.best.policy_version, progress.last.policy_version)
    assert versions == (0, 4, 5)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_pairs_that_are_all_too_long_are_an_input_error(tmp_path: Path, split: str) -> None:
    long, short = TokenPair("p", (1,) * 9, (2, 3), (4,), "", ""), TokenPair("q", (1,), (2,), (3,), "", "")
    for name in ("train", "validation"):
        write_token_pairs(tmp_path / f"{name}.parquet", [long if name == split else short])
    inputs = OfflineInputs(tmp_path, tmp_path / "sft", max_tokens=10, too_long="drop", temperature=1.0)
    outputs = PolicyOutputs(tmp_path, tmp_path, tmp_path, tmp_path)

    with pytest.raises(InputError) as caught:
        train_offline(inputs, make_config(), Timeline(tmp_path / "t"), tmp_path, outputs, lambda *_: None)

    assert str(caught.value) == (
        f"{tmp_path}/{split}.parquet: none of 1 pairs of split {split} fits into reward.max_tokens=10, which "
        "rl.algorithm.name='dpo' keeps to as well; raise it"
    )
