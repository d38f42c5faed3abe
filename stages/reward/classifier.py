"""Stage train_reward where a classifier takes the reward model's place: it is measured, and trained on nothing."""

from collections.abc import Sequence
from pathlib import Path

from stages.common.errors import InputError
from stages.data.records import Completion
from stages.data.scorers import ClassifierScorer as ClassifierSettings
from stages.data.text import TokenSequence
from stages.data.token_pairs import TokenPair
from stages.reward.evaluate import Accuracy, measure_accuracy
from stages.scoring.classifier import ClassifierScorer, write_classifier
from stages.scoring.start import start_classifier


def publish_classifier(
    settings: ClassifierSettings, policy: Path, samples: Sequence[Completion], save_to: Path
) -> ClassifierScorer:
    """Write the classifier as the reward artifact, with the range of its scores on SFT samples; return its scorer.

    Raises:
        InputError: no readable classifier, none with this label, or no samples.
    """
    if not samples:
        raise InputError("artifacts/pairs: has no samples of the SFT model to see the classifier's range on")
    scorer = start_classifier(settings, policy)
    scores = scorer.score(samples)
    write_classifier(save_to, settings, policy, (min(scores), max(scores)))
    return scorer


def measure_classifier(classifier: ClassifierScorer, pairs: Sequence[TokenPair], seed: int) -> Accuracy | None:
    """How often it prefers the chosen completion of a labelled pair, a tie counting half; None without pairs."""
    if not pairs:
        return None
    chosen, rejected = (
        classifier.score_sequences([TokenSequence(pair.prompt_ids, ids) for pair, ids in zip(pairs, side, strict=True)])
        for side in ([pair.chosen_ids for pair in pairs], [pair.rejected_ids for pair in pairs])
    )
    margins = [better - worse for better, worse in zip(chosen, rejected, strict=True)]
    return measure_accuracy(margins, [pair.prompt_id for pair in pairs], seed)
