"""Stage train_policy: reinforcement learning against the reward model."""

from pathlib import Path

from stages.common.config import load_section
from stages.common.entry import run_entry
from stages.generation.config import GenerationConfig
from stages.rl.config import RlConfig


def main() -> None:
    """Prompts, SFT and reward model -> artifacts/policy, artifacts/policy_last, artifacts/ledger,
    metrics/policy.json."""
    config = load_section("rl", RlConfig)
    generation = load_section("generation", GenerationConfig)
    from stages.common.history import History
    from stages.common.pipeline import flatten
    from stages.common.publish import staging_directory, write_json
    from stages.common.tracking import track_stage
    from stages.common.workdir import open_workdir
    from stages.rl.report import summarise
    from stages.rl.timeline import read_spans
    from stages.rl.timeline_figure import draw_timeline
    from stages.rl.train import TIMELINE, PolicyInputs, PolicyOutputs, train_policy

    with (
        open_workdir("train_policy") as workdir,
        track_stage("train_policy", config, resume_dir=workdir.path) as tracker,
        staging_directory(Path("artifacts/policy")) as best,
        staging_directory(Path("artifacts/policy_last")) as last,
        staging_directory(Path("artifacts/ledger")) as ledger,
    ):
        history = History(workdir.path / "history.jsonl", tracker.log_metrics)
        result = train_policy(
            PolicyInputs(Path("artifacts/data"), Path("artifacts/sft"), Path("artifacts/reward")),
            config,
            generation,
            workdir.path,
            save_to=PolicyOutputs(best, last, ledger),
            log_metrics=history.log,
        )
        metrics = summarise(result, config.num_updates)
        tracker.log_summary({f"policy/{name}": value for name, value in flatten(metrics).items()})
        result.timeline.flush()
        tracker.log_figure("timeline", draw_timeline(read_spans(workdir.path / TIMELINE)))
        write_json(Path("metrics/policy.json"), metrics)
        history.write_csv(Path("plots/policy.csv"))
    workdir.discard()


if __name__ == "__main__":
    run_entry(main)
