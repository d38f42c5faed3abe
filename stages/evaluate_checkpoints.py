"""`python -m stages.evaluate_checkpoints`: judge every version that a run has kept (`rl.keep_checkpoints`).

It reads a finished run's artifacts and changes none, so it can run long after the run, and elsewhere. A version is
sampled once and the LLM judge's verdicts are bought once; what is made of them is computed anew each time. The curve
over training goes to MLflow, with policy_version as the step.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from stages.common.config import load_section
from stages.common.entry import run_entry
from stages.data.config import DataConfig
from stages.generation.config import GenerationConfig
from stages.judge.config import JudgeConfig

if TYPE_CHECKING:
    from stages.common.tracking import Tracker

COLUMNS = ("gold_win_rate", "llm_win_rate", "proxy_mean_policy", "kl_nats", "length_ratio", "finished_fraction_policy")
KEPT, SFT, DATA, REWARD = (Path("artifacts") / name for name in ("checkpoints", "sft", "data", "reward"))
TABLE = Path(".slipstream/checkpoints.md")


def main() -> None:
    """Kept versions, SFT and reward model, prompts -> metrics in MLflow, a table on standard output."""
    config = load_section("judge", JudgeConfig)
    generation = load_section("generation", GenerationConfig)
    data = load_section("data", DataConfig)
    from stages.common.publish import write_text
    from stages.common.tracking import track_stage
    from stages.judge.checkpoints import find_checkpoints
    from stages.models.load import quiet_transformers

    quiet_transformers()
    checkpoints = find_checkpoints(KEPT)
    workdir = _find_workdir(config, generation)
    with track_stage("evaluate_checkpoints", (config, generation), resume_dir=workdir, is_side=True) as tracker:
        results = _judge(checkpoints, workdir, config, generation, data)
        _report(results, tracker)
    write_text(TABLE, render_table(results))
    sys.stdout.write(render_table(results))


def _judge(
    checkpoints: dict[int, Path], workdir: Path, config: JudgeConfig, generation: GenerationConfig, data: DataConfig
) -> dict[int, dict[str, float]]:
    """What every judge says of each version, by policy_version."""
    from stages.common.tracking import read_tracking_config
    from stages.data.store import read_prompts
    from stages.judge.alarms import raise_alarms
    from stages.judge.checkpoints import SAMPLES, sample_checkpoints
    from stages.judge.comparison import Scorers, read_comparison
    from stages.judge.evaluate import evaluate_comparison, select_numbers
    from stages.judge.llm_judge import evaluate_by_llm
    from stages.judge.opponents import Places
    from stages.judge.pass_rate import measure_pass_rates
    from stages.scoring.load import load_scorer
    from stages.scoring.rule import is_rule
    from stages.scoring.start import start_scorer

    prompts = read_prompts(DATA, "heldout")
    folders = sample_checkpoints(checkpoints, SFT, prompts, config, generation, workdir)
    gold, second = (start_scorer(scorer, SFT, DATA) for scorer in data.task.scorers())
    scorers = Scorers(gold, second, load_scorer(REWARD, config.dtype, config.micro_batch_tokens))
    results = {}
    for version, folder in folders.items():
        comparison = read_comparison(folder, scorers)
        metrics = evaluate_comparison(comparison, config.seed)
        metrics |= measure_pass_rates(comparison, config.seed) if is_rule(DATA) else {}
        if config.model is not None:
            places = Places(folder, DATA, read_tracking_config().experiment, evaluation=workdir / SAMPLES)
            metrics |= evaluate_by_llm(comparison, prompts, scorers, config, places, SFT).metrics
        _, switches = raise_alarms(metrics, config.against)
        results[version] = select_numbers(metrics | switches)
    return results


def _report(results: dict[int, dict[str, float]], tracker: "Tracker") -> None:
    from stages.judge.plots import draw_frontier

    for version, numbers in results.items():
        tracker.log_metrics({f"checkpoint/{name}": value for name, value in numbers.items()}, version)
    tracker.log_table("checkpoints", [{"policy_version": version, **row} for version, row in results.items()])
    tracker.log_figure("frontier", draw_frontier(results))


def render_table(results: dict[int, dict[str, float]]) -> str:
    """One line a version, as Markdown."""
    columns = [name for name in COLUMNS if all(name in row for row in results.values())]
    lines = ["| policy_version | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 1)]
    lines += [
        f"| {version} | " + " | ".join(f"{row[name]:.3f}" for name in columns) + " |"
        for version, row in results.items()
    ]
    return "\n".join(lines) + "\n"


def _find_workdir(config: JudgeConfig, generation: GenerationConfig) -> Path:
    """Where samples of these versions lie: everything they are made of is in its name, and nothing else."""
    from stages.common.hashing import hash_paths, hash_text

    sampled = (config.samples_per_prompt, config.seed, config.micro_batch_tokens, config.dtype)
    hashes = hash_paths(tuple(str(path) for path in (KEPT, SFT, DATA)))
    name = hash_text(f"{hashes} {sampled} {generation.model_dump_json()}")[:16]
    workdir = Path(".slipstream/evaluations") / name
    workdir.mkdir(parents=True, exist_ok=True)
    return workdir


if __name__ == "__main__":
    run_entry(main)
