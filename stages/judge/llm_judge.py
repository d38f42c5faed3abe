"""What the LLM judge adds to an evaluation: its win-rate, its agreement with the scorers, rows for people."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from stages.common.hashing import hash_paths, hash_text
from stages.data.records import Completion, Prompt
from stages.judge.agreement import GoldScores, list_disagreements, measure_agreement
from stages.judge.comparison import Comparison, Scorers
from stages.judge.config import JudgeConfig
from stages.judge.evaluate import Metrics, compute_wins, judge_wins
from stages.judge.length_control import measure_length_control
from stages.judge.llm.judging import Judging, judge_matches
from stages.judge.matches import Judgement
from stages.judge.opponents import SFT, Opponent, Places, find_opponent, make_matches
from stages.judge.preferences import measure_preferences
from stages.models.load import load_tokenizer

WORK = Path(".slipstream/judge")
"""Holds what each evaluation has spent, over restarts."""

logger = logging.getLogger(__name__)

Rows = list[dict[str, str | float | None]]


@dataclass(frozen=True)
class LlmEvaluation:
    """Everything the LLM judge said about the policy's samples."""

    opponent: Opponent
    judgements: tuple[Judgement, ...]
    metrics: Metrics
    disagreements: Rows
    """Matches that judge and gold scorer decide differently, the widest gap first; empty without a gold scorer."""


def evaluate_by_llm(
    comparison: Comparison,
    prompts: Sequence[Prompt],
    scorers: Scorers,
    config: JudgeConfig,
    places: Places,
    sft: Path,
) -> LlmEvaluation:
    """Put every completion of the policy before the LLM judge, and compare it with the scorers.

    Args:
        comparison: of both models.
        prompts: the held-out ones.
        scorers: gold and proxy, for an opponent that is not the SFT model.
        config: section `judge`, with a model.
        places: where the opponent is looked for.
        sft: model directory of the tokenizer.

    Raises:
        SettingError: the key is missing, or `judge.against` names nothing.
        InputError: the opponent's file is wrong.
        RunError: the budget is used up, the endpoint refuses, or too many replies cannot be used.
    """
    asked = set(comparison.prompt_ids)
    opponent = find_opponent(config.against, [prompt for prompt in prompts if prompt.prompt_id in asked], places)
    matches = make_matches(prompts, comparison.policy.completions, opponent)
    judging = judge_matches(matches, config, _find_workdir(places, opponent, config))
    gold, proxy_wins = _score(comparison, opponent, scorers, config, sft)
    return LlmEvaluation(
        opponent=opponent,
        judgements=judging.judgements,
        metrics={
            **measure_preferences(judging.judgements, config.seed),
            **measure_length_control(judging.judgements, config.seed),
            **measure_agreement(judging.judgements, gold.wins if gold else None, proxy_wins),
            **count_questions(judging),
        },
        disagreements=list_disagreements(judging.judgements, gold) if gold else [],
    )


def count_questions(judging: Judging) -> Metrics:
    """What was asked, what became of it, and what it costs."""
    return {
        "llm_num_verdicts": judging.num_bought + judging.num_cached,
        "llm_num_unanswered": judging.num_unanswered,
        "llm_num_unreadable": judging.num_unreadable,
        "llm_num_calls": judging.num_calls,
        "llm_prompt_tokens": judging.prompt_tokens,
        "llm_completion_tokens": judging.completion_tokens,
        "llm_cost_usd": judging.cost_usd,
    }


def _score(
    comparison: Comparison, opponent: Opponent, scorers: Scorers, config: JudgeConfig, sft: Path
) -> tuple[GoldScores | None, list[float]]:
    """What gold and proxy say about the very same matches; gold is None where the task has none."""
    policy, other = comparison.policy, comparison.sft
    gold_wins, other_gold, other_proxy = judge_wins(comparison, "gold"), other.gold, other.proxy
    if config.against != SFT:
        opponents = _make_completions(policy.completions, opponent, sft)
        other_gold = scorers.gold.score(opponents) if scorers.gold else None
        other_proxy = scorers.proxy.score(opponents)
        if policy.gold is not None and other_gold is not None:
            finished = ([item.is_finished for item in items] for items in (policy.completions, opponents))
            gold_wins = compute_wins(policy.gold, other_gold, *finished)
    gold = None
    if gold_wins is not None and policy.gold is not None and other_gold is not None:
        gold = GoldScores(gold_wins, policy.gold, other_gold)
    return gold, compute_wins(policy.proxy, other_proxy)


def _make_completions(policy: Sequence[Completion], opponent: Opponent, sft: Path) -> list[Completion]:
    """The opponent's texts as scorers read them: tokens of the SFT model's tokenizer, and EOS if they are finished."""
    tokenizer = load_tokenizer(sft)
    completions = []
    for completion in policy:
        key = opponent.find_key(completion)
        is_finished = opponent.finished.get(key, True)
        token_ids = tuple(tokenizer(opponent.texts[key], add_special_tokens=False)["input_ids"])
        token_ids += (tokenizer.eos_token_id,) if is_finished or not token_ids else ()
        completions.append(
            replace(
                completion,
                text=opponent.texts[key],
                token_ids=token_ids,
                sampling_logprobs=(0.0,) * len(token_ids),
                token_policy_versions=(),
                is_finished=is_finished,
            )
        )
    return completions


def _find_workdir(places: Places, opponent: Opponent, config: JudgeConfig) -> Path:
    """One for each question that can be asked: the same samples, opponent, judge and rubric. Limits may change."""
    folder = str(places.evaluation or places.samples)
    other = SFT if config.against == SFT else opponent.sha256  # the SFT model's are among the samples
    asked = (config.model, config.base_url, config.mode, config.prompt, config.structured, config.temperature)
    return WORK / hash_text(f"{hash_paths((folder,))[folder]} {other} {asked} {config.max_reply_tokens}")[:16]
