"""`python -m stages.check_params`: every section of params.yaml, before anything runs."""

from pathlib import Path

from stages.common.config import PARAMS, Section, load_section
from stages.common.entry import run_entry
from stages.common.errors import SettingError
from stages.common.tracking import TrackingConfig
from stages.data.config import DataConfig
from stages.data.scorers import RuleScorer
from stages.data.tasks.pairs import PairsTask
from stages.generation.config import GenerationConfig, require_engine, require_room
from stages.generation.engine_args import check_engine_args
from stages.judge.config import JudgeConfig
from stages.judge.gate import GateConfig
from stages.models.config import ModelConfig
from stages.reward.config import PairsConfig, RewardConfig
from stages.rl.algorithm_config import DpoConfig, check_greedy_max_tokens
from stages.rl.config import RlConfig
from stages.rl.scorer import resolve_missing_eos_score
from stages.scoring.rule import SCORE_RANGE
from stages.sft.config import SftConfig

SECTIONS: dict[str, type[Section]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "generation": GenerationConfig,
    "sft": SftConfig,
    "pairs": PairsConfig,
    "reward": RewardConfig,
    "rl": RlConfig,
    "judge": JudgeConfig,
    "promotion": GateConfig,
    "tracking": TrackingConfig,
}


def main() -> None:
    """Report every wrong setting of all sections at once."""
    require_settings(PARAMS)


def require_settings(path: Path) -> None:
    """Check params.yaml, or a recipe.

    Raises:
        SettingError: one line for each wrong setting of all sections.
    """
    problems: list[str] = []
    for name, section in SECTIONS.items():
        try:
            load_section(name, section, path)
        except SettingError as error:
            problems += str(error).splitlines()
    if not problems:
        problems = _check_combinations(path)
    if problems:
        raise SettingError("\n".join(dict.fromkeys(problems)))
    _check_judge(path)
    generation = load_section("generation", GenerationConfig, path)
    check_engine_args(generation.engine_args)


def _check_judge(path: Path) -> None:
    """What is found at the pipeline's end otherwise.

    Raises:
        SettingError: there is no such rubric, or the endpoint wants a key and there is none.
    """
    config = load_section("judge", JudgeConfig, path)
    if config.model is None:
        return
    from stages.judge.llm.client import read_key  # openai takes a second to import
    from stages.judge.llm.rubric import load_rubric

    load_rubric(config.mode, config.prompt)
    read_key(config.base_url)


def _check_combinations(path: Path) -> list[str]:
    """What two sections must agree on."""
    data = load_section("data", DataConfig, path)
    generation = load_section("generation", GenerationConfig, path)
    rl = load_section("rl", RlConfig, path)
    problems = []
    if rl.num_eval_prompts > data.num_validation_prompts:
        problems.append(
            f"rl.num_eval_prompts={rl.num_eval_prompts} exceeds "
            f"data.num_validation_prompts={data.num_validation_prompts}"
        )
    sampling = {
        "pairs.samples_per_prompt": load_section("pairs", PairsConfig, path).samples_per_prompt,
        "judge.samples_per_prompt": load_section("judge", JudgeConfig, path).samples_per_prompt,
    }
    try:
        check_greedy_max_tokens(rl.algorithm, generation.max_new_tokens)
        require_engine(generation, rl.generator, rl.weight_update, rl.publish)
        for setting, num_samples in sampling.items():
            require_room(generation, num_samples, setting)
        if not isinstance(rl.algorithm, DpoConfig):
            require_room(generation, rl.algorithm.samples_per_prompt, "rl.algorithm.samples_per_prompt")
    except SettingError as error:
        problems.append(str(error))
    problems += _check_turns(data, load_section("model", ModelConfig, path))
    reward = load_section("reward", RewardConfig, path)
    if isinstance(data.task.scorers()[0], RuleScorer) and reward.classifier is not None:
        problems.append("reward.classifier: the task has a rule, which RL trains on; set it to null")
    has_rule = isinstance(data.task.scorers()[0], RuleScorer)
    if has_rule:
        problems += _check_missing_eos_score(rl)
    return problems + _check_max_tokens(rl, generation, reward, has_model=not has_rule and reward.classifier is None)


def _check_missing_eos_score(rl: RlConfig) -> list[str]:
    """A rule's scores are known before anything has run."""
    try:
        resolve_missing_eos_score(rl.missing_eos_score, SCORE_RANGE)
    except SettingError as error:
        return [str(error)]
    return []


def _check_max_tokens(
    rl: RlConfig, generation: GenerationConfig, reward: RewardConfig, *, has_model: bool
) -> list[str]:
    """Whether a reward model, or offline DPO, is trained on texts as long as those that are sampled."""
    longest = generation.max_prompt_tokens + generation.max_new_tokens
    is_offline = isinstance(rl.algorithm, DpoConfig)
    if reward.max_tokens >= longest or not (has_model or is_offline):
        return []
    what = "the reward model would score completions longer than it was trained on"
    if not has_model:
        what = "rl.algorithm.name='dpo' would train on the shorter pairs alone"
    return [
        f"reward.max_tokens={reward.max_tokens} is below generation.max_prompt_tokens + generation.max_new_tokens "
        f"= {longest}: {what}"
    ]


def _check_turns(data: DataConfig, model: ModelConfig) -> list[str]:
    """Whether a prompt of several turns still says who speaks."""
    is_read_as_turns = isinstance(data.task, PairsTask) and data.task.format == "transcripts"
    if not is_read_as_turns or model.chat_template != "plain":
        return []
    return [
        "data.task.format='transcripts' with model.chat_template='plain': nothing would say whose turn is whose; use "
        "format columns, with the speakers in the prompt's text, or a model with a chat template"
    ]


if __name__ == "__main__":
    run_entry(main)
