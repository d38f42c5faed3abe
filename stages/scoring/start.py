"""A scorer from its settings."""

from pathlib import Path
from typing import TYPE_CHECKING

from stages.common.errors import InputError
from stages.common.watched import warn_unless_watched
from stages.data.scorers import ClassifierScorer, GoldConfig, ModelScorer, NoScorer
from stages.data.scorers import LengthScorer as LengthSettings
from stages.data.scorers import RuleScorer as RuleSettings
from stages.data.scorers import TextblobScorer as TextblobSettings
from stages.data.scorers import VaderScorer as VaderSettings
from stages.scoring.lexicon import LengthScorer, TextblobScorer, VaderScorer
from stages.scoring.protocol import Scorer
from stages.scoring.rule import RuleScorer

if TYPE_CHECKING:
    from stages.scoring.classifier import ClassifierScorer as ReadyClassifier


def start_scorer(config: GoldConfig | None, policy: Path, data: Path) -> Scorer | None:
    """The scorer a task names, or None where it names none.

    Args:
        config: settings of the task.
        policy: model directory whose tokenizer made the token ids; a gold model must share it.
        data: the data artifact, which holds the rule of a task that has one.

    Raises:
        InputError: a gold model with another tokenizer, an unreadable classifier, or data without a rule.
    """
    match config:
        case None | NoScorer():
            return None
        case VaderSettings():
            return VaderScorer()
        case TextblobSettings():
            return TextblobScorer()
        case LengthSettings():
            return LengthScorer()
        case RuleSettings():
            return RuleScorer(data)
        case ModelScorer(path=path):
            return _start_model(Path(path), policy)
        case ClassifierScorer() as settings:
            return start_classifier(settings, policy)


def start_classifier(settings: ClassifierScorer, policy: Path) -> "ReadyClassifier":
    """The user's classifier, for token ids of the model in `policy`.

    Raises:
        InputError: no readable classifier, or none with this label.
    """
    from stages.models.load import load_tokenizer
    from stages.models.source import WATCHED
    from stages.scoring.classifier import ClassifierScorer as ReadyClassifier

    warn_unless_watched(Path(settings.path), WATCHED)
    return ReadyClassifier(settings, load_tokenizer(policy))


def _start_model(path: Path, policy: Path) -> Scorer:
    from stages.models.load import load_tokenizer
    from stages.models.source import WATCHED
    from stages.scoring.reward import RewardScorer

    warn_unless_watched(path, WATCHED)
    if load_tokenizer(path).get_vocab() != load_tokenizer(policy).get_vocab():
        raise InputError(f"{path}: the gold model's tokenizer differs from that of {policy}; token ids would not match")
    return RewardScorer(path, "bf16", micro_batch_tokens=4096)
