"""Stage sample_policy: held-out completions of the policy and of its SFT parent, with logprobs and KL."""

from pathlib import Path

from stages.common.config import load_section
from stages.common.entry import run_entry
from stages.generation.config import GenerationConfig, require_room
from stages.judge.config import JudgeConfig


def main() -> None:
    """Held-out prompts, SFT model, policy -> artifacts/samples, metrics/samples.json. Wired in dvc.yaml."""
    config = load_section("judge", JudgeConfig)
    generation = load_section("generation", GenerationConfig)
    require_room(generation, config.samples_per_prompt, "judge.samples_per_prompt")
    from stages.common.publish import staging_directory, write_json
    from stages.common.tracking import track_stage
    from stages.common.workdir import open_workdir
    from stages.data.completion_store import write_completions
    from stages.data.store import read_prompts
    from stages.judge.sample import Models, measure_samples, read_policy_version, sample_both
    from stages.models.load import quiet_transformers

    quiet_transformers()
    models = Models(
        sft=Path("artifacts/sft"),
        policy=Path("artifacts/policy"),
        policy_version=read_policy_version(Path("artifacts/policy")),
    )
    with (
        open_workdir("sample_policy") as workdir,
        track_stage("sample_policy", (config, generation), resume_dir=workdir.path) as tracker,
        staging_directory(Path("artifacts/samples")) as staged,
    ):
        prompts = read_prompts(Path("artifacts/data"), "heldout")
        samples = sample_both(prompts, models, config, generation, workdir.path)
        sft_columns, policy_columns = measure_samples(samples, models, config, generation.temperature)
        write_completions(staged / "sft.parquet", samples.sft, sft_columns)
        write_completions(staged / "policy.parquet", samples.policy, policy_columns)
        tracker.log_summary({f"samples/{name}": value for name, value in samples.metrics().items()})
        write_json(Path("metrics/samples.json"), samples.metrics())
    workdir.discard()


if __name__ == "__main__":
    run_entry(main)
