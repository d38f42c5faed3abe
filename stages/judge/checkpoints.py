"""Every kept version of a run, sampled as the final policy is."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from stages.common.errors import InputError
from stages.common.publish import read_json, staging_directory
from stages.data.completion_store import write_completions
from stages.data.records import Prompt
from stages.generation.config import GenerationConfig
from stages.judge.config import JudgeConfig
from stages.judge.sample import Models, Samples, measure_samples, sample_versions

INDEX, SAMPLES = "index.json", "samples"


def find_checkpoints(folder: Path) -> dict[int, Path]:
    """Model directories by policy_version, oldest first.

    Raises:
        InputError: the folder is not train_policy's, or holds no version.
    """
    try:
        versions = read_json(folder / INDEX)["policy_versions"]
    except FileNotFoundError as error:
        raise InputError(f"{folder / INDEX}: not found; train_policy writes it") from error
    if not versions:
        raise InputError(f"{folder}: holds no version; rl.keep_checkpoints says how many a run keeps")
    return {version: folder / f"{version:04}" for version in sorted(versions)}


def sample_checkpoints(
    checkpoints: Mapping[int, Path],
    sft: Path,
    prompts: Sequence[Prompt],
    config: JudgeConfig,
    generation: GenerationConfig,
    workdir: Path,
) -> dict[int, Path]:
    """Each version's completions beside the SFT model's, measured: a folder for `read_comparison`, by policy_version.

    Args:
        checkpoints: model directories by policy_version, of one SFT model.
        sft: its model directory.
        prompts: the held-out ones.
        config: section `judge`.
        generation: section `generation`.
        workdir: the folders are in its folder `SAMPLES`, where those that are whole are left as they are; servers
            write their logs here.

    Raises:
        InputError: no model where one is expected, or no prompt is within `max_prompt_tokens`.
        GeneratorError: the generator died or did not sample from a version's weights.
    """
    folders = {version: workdir / SAMPLES / f"{version:04}" for version in checkpoints}
    missing = [Models(sft, checkpoints[version], version) for version in folders if not folders[version].exists()]
    if missing:
        # All are sampled first, so that the server's memory is free for measuring.
        found = sample_versions(prompts, missing, config, generation, workdir)
        for models, of_both in zip(missing, found, strict=True):
            _write_samples(folders[models.policy_version], of_both, models, config, generation)
    return folders


def _write_samples(
    folder: Path, samples: Samples, models: Models, config: JudgeConfig, generation: GenerationConfig
) -> None:
    sft_columns, policy_columns = measure_samples(samples, models, config, generation.temperature)
    with staging_directory(folder) as staged:
        write_completions(staged / "sft.parquet", samples.sft, sft_columns)
        write_completions(staged / "policy.parquet", samples.policy, policy_columns)
