"""Stage train_reward: the reward model, trained on labelled pairs; or a task's rule or a classifier instead."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.common.config import load_section
from stages.common.entry import run_entry
from stages.common.errors import SettingError
from stages.data.scorers import ClassifierScorer
from stages.reward.config import RewardConfig

if TYPE_CHECKING:
    from stages.common.tracking import Tracker

SFT, PAIRS = Path("artifacts/sft"), Path("artifacts/pairs")
CURVE = Path("plots/reward.csv")
NO_CURVE = "step,learner/loss\n"
"""dvc.yaml promises the file, also where nothing is trained."""


def main() -> None:
    """Pairs + SFT model, a rule or a classifier -> artifacts/reward, metrics/reward.json. Wired in dvc.yaml."""
    config = load_section("reward", RewardConfig)
    from stages.common.publish import staging_directory, write_json
    from stages.common.tracking import track_stage
    from stages.common.workdir import open_workdir
    from stages.learner.launch import serve_leader
    from stages.scoring.rule import is_rule

    data = Path("artifacts/data")
    has_rule = is_rule(data)
    if serve_leader(config.learner, "reward.learner", has_work=not has_rule and config.classifier is None):
        return
    if has_rule and config.classifier is not None:
        raise SettingError("reward.classifier: the task has a rule, which RL trains on; set it to null")
    with (
        open_workdir("train_reward") as workdir,
        track_stage("train_reward", config, resume_dir=workdir.path) as tracker,
        staging_directory(Path("artifacts/reward")) as staged,
    ):
        if has_rule:
            metrics = _write_rule(data, config, staged, tracker)
        elif config.classifier is not None:
            metrics = _write_classifier(config, config.classifier, staged, tracker)
        else:
            metrics = _train_model(config, workdir.path, staged, tracker)
        write_json(Path("metrics/reward.json"), metrics)
    workdir.discard()


def _train_model(config: RewardConfig, workdir: Path, staged: Path, tracker: "Tracker") -> dict[str, Any]:
    """A reward model into `staged`, its curve, and what metrics/reward.json says of it."""
    from stages.common.history import History
    from stages.data.completion_store import read_completions
    from stages.data.token_pairs import read_token_pairs
    from stages.reward.evaluate import calibration_table, measure_accuracy
    from stages.reward.train import RewardData, train_reward_model

    history = History(workdir / "history.jsonl", tracker.log_metrics)
    result = train_reward_model(
        RewardData(
            train=read_token_pairs(PAIRS / "train.parquet"),
            validation=read_token_pairs(PAIRS / "validation.parquet"),
            samples=read_completions(PAIRS / "samples.parquet"),
        ),
        init_from=SFT,
        config=config,
        workdir=workdir,
        save_to=staged,
        log_metrics=history.log,
    )
    accuracy = measure_accuracy(result.margins, result.prompt_ids, config.seed)
    calibration = calibration_table(result.margins)
    tracker.log_table("calibration", calibration)
    tracker.log_summary({"reward/heldout_accuracy": accuracy.value, "reward/heldout_pairs": accuracy.num_pairs})
    history.write_csv(CURVE)
    return {
        "accuracy": accuracy.value,
        "accuracy_interval": accuracy.interval,
        "num_pairs": accuracy.num_pairs,
        "num_dropped": result.train_lengths.num_dropped,
        "num_truncated": result.train_lengths.num_truncated,
        "num_validation_dropped": result.validation_lengths.num_dropped,
        "num_validation_truncated": result.validation_lengths.num_truncated,
        "calibration": calibration,
    }


def _write_rule(data: Path, config: RewardConfig, staged: Path, tracker: "Tracker") -> dict[str, Any]:
    """The data's rule into `staged`, an empty curve, and what metrics/reward.json says of it."""
    from stages.common.publish import write_text
    from stages.data.token_pairs import read_token_pairs
    from stages.reward.rule import measure_agreement, publish_rule

    rule = publish_rule(data, staged)
    pairs = [pair for split in ("train", "validation") for pair in read_token_pairs(PAIRS / f"{split}.parquet")]
    agreement = measure_agreement(rule, pairs, config.seed)
    if agreement is not None:
        tracker.log_summary({"reward/rule_agreement": agreement.value})
    write_text(CURVE, NO_CURVE)
    return {
        "kind": "rule",
        "rule_agreement": agreement.value if agreement else None,
        "rule_agreement_interval": agreement.interval if agreement else None,
        "num_pairs": len(pairs),
    }


def _write_classifier(
    config: RewardConfig, settings: ClassifierScorer, staged: Path, tracker: "Tracker"
) -> dict[str, Any]:
    """The user's classifier into `staged`, an empty curve, and what metrics/reward.json says of it."""
    from stages.common.publish import write_text
    from stages.data.completion_store import read_completions
    from stages.data.token_pairs import read_token_pairs
    from stages.reward.classifier import measure_classifier, publish_classifier

    classifier = publish_classifier(settings, SFT, read_completions(PAIRS / "samples.parquet"), staged)
    accuracy = measure_classifier(classifier, read_token_pairs(PAIRS / "validation.parquet"), config.seed)
    if accuracy is not None:
        tracker.log_summary({"reward/heldout_accuracy": accuracy.value, "reward/heldout_pairs": accuracy.num_pairs})
    write_text(CURVE, NO_CURVE)
    return {
        "kind": "classifier",
        "accuracy": accuracy.value if accuracy else None,
        "accuracy_interval": accuracy.interval if accuracy else None,
        "num_pairs": accuracy.num_pairs if accuracy else 0,
    }


if __name__ == "__main__":
    run_entry(main)
