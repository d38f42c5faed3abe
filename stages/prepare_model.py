"""Stage prepare_model: the base model as a Hugging Face directory in artifacts/base."""

from pathlib import Path

from stages.common.config import load_section
from stages.common.entry import run_entry
from stages.models.config import ModelConfig


def main() -> None:
    """Settings -> artifacts/base. Wired in dvc.yaml."""
    config = load_section("model", ModelConfig)
    from stages.common.publish import staging_directory
    from stages.common.tracking import track_stage
    from stages.models.source import prepare_base_model

    with track_stage("prepare_model", config), staging_directory(Path("artifacts/base")) as staged:
        prepare_base_model(config, staged)


if __name__ == "__main__":
    run_entry(main)
