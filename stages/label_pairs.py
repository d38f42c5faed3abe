"""Stage label_pairs: labelled preference pairs for the reward model."""

from pathlib import Path

from stages.common.config import load_section
from stages.common.entry import run_entry
from stages.data.config import DataConfig
from stages.generation.config import GenerationConfig, require_room
from stages.reward.config import PairsConfig


def main() -> None:
    """Prompts, human pairs, SFT model -> artifacts/pairs, metrics/pairs.json. Wired in dvc.yaml."""
    config = load_section("pairs", PairsConfig)
    generation = load_section("generation", GenerationConfig)
    data = load_section("data", DataConfig)
    require_room(generation, config.samples_per_prompt, "pairs.samples_per_prompt")
    from stages.common.publish import staging_directory, write_json
    from stages.common.tracking import track_stage
    from stages.common.workdir import open_workdir
    from stages.data.completion_store import write_completions
    from stages.data.token_pairs import write_token_pairs
    from stages.reward.label import label_splits
    from stages.scoring.start import start_scorer

    data_path, sft = Path("artifacts/data"), Path("artifacts/sft")
    gold_config, _ = data.task.scorers()
    with (
        open_workdir("label_pairs") as workdir,
        track_stage("label_pairs", (config, generation, data), resume_dir=workdir.path) as tracker,
        staging_directory(Path("artifacts/pairs")) as staged,
    ):
        gold = start_scorer(gold_config, sft, data_path)
        labelled = label_splits(data_path, sft, gold, config, generation, workdir.path)
        for split, result in labelled.items():
            write_token_pairs(staged / f"{split}.parquet", result.pairs)
        train = labelled["train"]
        scores = {"gold": train.scores} if train.scores else {}
        write_completions(staged / "samples.parquet", train.samples, scores)
        metrics: dict[str, float] = {
            f"{name}_{split}": value
            for split, result in labelled.items()
            for name, value in (
                ("num_pairs", len(result.pairs)),
                ("num_ties", result.num_ties),
                ("num_prompts_too_long", result.num_prompts_too_long),
            )
        }
        metrics["num_samples"] = len(train.samples)
        metrics["finished_fraction"] = sum(item.is_finished for item in train.samples) / len(train.samples)
        tracker.log_summary({f"pairs/{name}": value for name, value in metrics.items()})
        write_json(Path("metrics/pairs.json"), metrics)
    workdir.discard()


if __name__ == "__main__":
    run_entry(main)
