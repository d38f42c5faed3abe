"""Stage train_sft: the base model fine-tuned on demonstrations."""

from pathlib import Path

from stages.common.config import load_section
from stages.common.entry import run_entry
from stages.sft.config import SftConfig


def main() -> None:
    """Demonstrations + base model -> artifacts/sft, metrics/sft.json. Wired in dvc.yaml."""
    config = load_section("sft", SftConfig)
    from stages.common.history import History
    from stages.common.publish import staging_directory, write_json
    from stages.common.tracking import track_stage
    from stages.common.workdir import open_workdir
    from stages.data.store import read_demonstrations
    from stages.learner.launch import serve_leader
    from stages.sft.train import train_sft_model

    if serve_leader(config.learner, "sft.learner"):
        return
    data = Path("artifacts/data")
    with (
        open_workdir("train_sft") as workdir,
        track_stage("train_sft", config, resume_dir=workdir.path) as tracker,
        staging_directory(Path("artifacts/sft")) as staged,
    ):
        history = History(workdir.path / "history.jsonl", tracker.log_metrics)
        result = train_sft_model(
            demonstrations={split: read_demonstrations(data, split) for split in ("train", "validation")},
            init_from=Path("artifacts/base"),
            config=config,
            workdir=workdir.path,
            save_to=staged,
            log_metrics=history.log,
        )
        metrics = {
            "eval_loss_before": result.eval_loss_before,
            "eval_loss": result.eval_loss,
            "perplexity": result.perplexity,
            "num_samples": result.train_lengths.num_samples,
            "num_dropped": result.train_lengths.num_dropped,
            "num_truncated": result.train_lengths.num_truncated,
            "num_validation_dropped": result.validation_lengths.num_dropped,
            "num_validation_truncated": result.validation_lengths.num_truncated,
        }
        tracker.log_summary({f"sft/{name}": value for name, value in metrics.items()})
        history.write_csv(Path("plots/sft.csv"))
        write_json(Path("metrics/sft.json"), metrics)
    workdir.discard()


if __name__ == "__main__":
    run_entry(main)
