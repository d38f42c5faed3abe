"""All sections that a plan reads, checked together."""

from dataclasses import dataclass
from pathlib import Path

from stages.check_params import require_settings
from stages.common.config import load_section
from stages.common.pipeline import DVC_LOCK, read_lock
from stages.data.config import DataConfig
from stages.data.scorers import ClassifierScorer, ModelScorer, RuleScorer
from stages.generation.config import GenerationConfig
from stages.judge.config import JudgeConfig
from stages.judge.gate import GateConfig
from stages.models.config import ModelConfig
from stages.reward.config import PairsConfig, RewardConfig
from stages.rl.config import RlConfig
from stages.sft.config import SftConfig


@dataclass(frozen=True)
class Settings:
    """The sections of params.yaml or of a recipe."""

    model: ModelConfig
    data: DataConfig
    generation: GenerationConfig
    sft: SftConfig
    pairs: PairsConfig
    reward: RewardConfig
    rl: RlConfig
    judge: JudgeConfig
    promotion: GateConfig

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with the longest completion that is sampled."""
        return self.generation.max_prompt_tokens + self.generation.max_new_tokens

    @property
    def has_rule(self) -> bool:
        """Whether a rule, or a classifier of the user's, takes the reward model's place: none is trained."""
        return isinstance(self.data.task.scorers()[0], RuleScorer) or self.reward.classifier is not None

    @property
    def classifiers(self) -> tuple[Path, ...]:
        """Directories of the user's classifiers that score."""
        scorers = (*self.data.task.scorers(), self.reward.classifier)
        return tuple(dict.fromkeys(Path(item.path) for item in scorers if isinstance(item, ClassifierScorer)))

    @property
    def gold_model(self) -> Path | None:
        """Directory of the task's gold reward model, if that is what its gold scorer is."""
        gold = self.data.task.scorers()[0]
        return Path(gold.path) if isinstance(gold, ModelScorer) else None


@dataclass(frozen=True)
class Places:
    """Where files are looked for; neither directory needs to exist."""

    inputs: Path
    """What relative paths of settings are relative to: the checkout."""
    artifacts: Path
    """The folder of artifacts/ and metrics/: the checkout, or a recipe's workspace."""

    def has_made(self, model: ModelConfig) -> bool:
        """Whether the models in `artifacts` are of this section `model`; without a dvc.lock nothing says otherwise."""
        entry = read_lock(self.artifacts / DVC_LOCK).get("prepare_model")
        return entry is None or ModelConfig.model_validate(entry.settings["model"]) == model


def read_settings(path: Path) -> Settings:
    """Read params.yaml or a recipe.

    Raises:
        SettingError: one line for each wrong setting of all sections.
    """
    require_settings(path)
    return Settings(
        model=load_section("model", ModelConfig, path),
        data=load_section("data", DataConfig, path),
        generation=load_section("generation", GenerationConfig, path),
        sft=load_section("sft", SftConfig, path),
        pairs=load_section("pairs", PairsConfig, path),
        reward=load_section("reward", RewardConfig, path),
        rl=load_section("rl", RlConfig, path),
        judge=load_section("judge", JudgeConfig, path),
        promotion=load_section("promotion", GateConfig, path),
    )
