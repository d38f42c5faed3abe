"""Stage prepare_data: prompts, demonstrations and human pairs, split and checked."""

from pathlib import Path

from stages.common.config import load_section
from stages.common.entry import run_entry
from stages.data.config import DataConfig

ARTIFACT = Path("artifacts/data")
METRICS = Path("metrics/data.json")


def main() -> None:
    """Section `data` -> artifacts/data and metrics/data.json. Wired in dvc.yaml."""
    from stages.common.publish import staging_directory, write_json
    from stages.common.tracking import track_stage
    from stages.data.prepare import prepare_data
    from stages.data.store import write_task_data

    config = load_section("data", DataConfig)
    with track_stage("prepare_data", config) as tracker:
        prepared = prepare_data(config.task.load(config.seed), config)
        with staging_directory(ARTIFACT) as staged:
            write_task_data(staged, prepared)
        write_json(METRICS, prepared.metrics())
        tracker.log_metrics(prepared.metrics(), step=0)


if __name__ == "__main__":
    run_entry(main)
