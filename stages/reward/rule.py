"""Stage train_reward for a task with a rule: nothing is trained, the rule takes the reward model's place."""

from collections.abc import Sequence
from pathlib import Path

from stages.data.rules import read_rule, write_rule
from stages.data.token_pairs import TokenPair
from stages.reward.evaluate import Accuracy, measure_accuracy
from stages.scoring.rule import RuleScorer


def publish_rule(data: Path, save_to: Path) -> RuleScorer:
    """Write the rule of the data artifact as the reward artifact, and return its scorer.

    Raises:
        InputError: the data artifact's rule is damaged.
    """
    write_rule(save_to, read_rule(data))
    return RuleScorer(save_to)


def measure_agreement(rule: RuleScorer, pairs: Sequence[TokenPair], seed: int) -> Accuracy | None:
    """How often the rule prefers the chosen completion of a labelled pair, a tie counting half; None without pairs.

    The rule labelled the pairs itself, so what is missing to 1 are pairs in which a finished completion that is no
    better beat an unfinished one.
    """
    if not pairs:
        return None
    margins = [
        rule.score_text(pair.prompt_id, pair.chosen_text) - rule.score_text(pair.prompt_id, pair.rejected_text)
        for pair in pairs
    ]
    return measure_accuracy(margins, [pair.prompt_id for pair in pairs], seed)
