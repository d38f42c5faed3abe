"""Stage train_reward: the reward model, trained on labelled pairs from the SFT weights."""

from pathlib import Path

from stages.common.config import load_section
from stages.common.entry import run_entry
from stages.reward.config import RewardConfig


def main() -> None:
    """Pairs + SFT model -> artifacts/reward, metrics/reward.json. Wired in dvc.yaml."""
    config = load_section("reward", RewardConfig)
    from stages.common.history import History
    from stages.common.publish import staging_directory, write_json
    from stages.common.tracking import track_stage
    from stages.common.workdir import open_workdir
    from stages.data.completion_store import read_completions
    from stages.data.token_pairs import read_token_pairs
    from stages.reward.evaluate import calibration_table, measure_accuracy
    from stages.reward.train import RewardData, train_reward_model

    pairs = Path("artifacts/pairs")
    with (
        open_workdir("train_reward") as workdir,
        track_stage("train_reward", config, resume_dir=workdir.path) as tracker,
        staging_directory(Path("artifacts/reward")) as staged,
    ):
        history = History(workdir.path / "history.jsonl", tracker.log_metrics)
        result = train_reward_model(
            RewardData(
                train=read_token_pairs(pairs / "train.parquet"),
                validation=read_token_pairs(pairs / "validation.parquet"),
                samples=read_completions(pairs / "samples.parquet"),
            ),
            init_from=Path("artifacts/sft"),
            config=config,
            workdir=workdir.path,
            save_to=staged,
            log_metrics=history.log,
        )
        accuracy = measure_accuracy(result.margins, result.prompt_ids, config.seed)
        calibration = calibration_table(result.margins)
        tracker.log_table("calibration", calibration)
        tracker.log_summary({"reward/heldout_accuracy": accuracy.value, "reward/heldout_pairs": accuracy.num_pairs})
        metrics = {
            "accuracy": accuracy.value,
            "accuracy_interval": accuracy.interval,
            "num_pairs": accuracy.num_pairs,
            "num_dropped": result.lengths.num_dropped,
            "num_truncated": result.lengths.num_truncated,
            "calibration": calibration,
        }
        history.write_csv(Path("plots/reward.csv"))
        write_json(Path("metrics/reward.json"), metrics)
    workdir.discard()


if __name__ == "__main__":
    run_entry(main)
