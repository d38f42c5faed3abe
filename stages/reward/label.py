"""Stage label_pairs: from prompts (or human pairs) to labelled pairs of token ids."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from stages.common.errors import InputError, SettingError
from stages.data.records import Completion, Pair, Prompt, Split
from stages.data.store import read_pairs, read_prompts
from stages.data.text import decode_completion, encode_completion, encode_prompt
from stages.data.token_pairs import TokenPair
from stages.generation.config import GenerationConfig
from stages.generation.protocol import Generator, Request, SamplingPlan, generate
from stages.generation.requests import make_requests
from stages.generation.start import GeneratorSettings, start_generator
from stages.models.load import load_tokenizer
from stages.reward.config import PairsConfig
from stages.reward.pairs import select_pairs
from stages.scoring.protocol import Scorer

logger = logging.getLogger(__name__)

LABELLED: tuple[Split, ...] = ("train", "validation")
"""The held-out prompts are left alone: nothing is fitted or chosen on them."""
NUM_CENTRING_PROMPTS = 128
"""Prompts sampled for tasks with human pairs, where samples serve only to centre the scores."""


@dataclass(frozen=True)
class LabelledPairs:
    """What the stage writes and reports."""

    pairs: list[TokenPair]
    samples: list[Completion]
    """Every completion sampled from the SFT model: the reward model's scores are centred on them."""
    scores: list[float]
    """Gold score of each sample; empty without a gold scorer."""
    num_ties: int
    num_prompts_too_long: int


def label_samples(
    generator: Generator, gold: Scorer, requests: Sequence[Request], num_too_long: int, config: PairsConfig
) -> LabelledPairs:
    """K completions a prompt, scored by gold, paired."""
    groups = generate(generator, requests, SamplingPlan(config.samples_per_prompt))
    samples = [completion for group in groups for completion in group]
    scores = gold.score(samples)
    pairs: list[TokenPair] = []
    num_ties = start = 0
    for group in groups:
        found, ties = select_pairs(group, scores[start : start + len(group)], config.select)
        pairs += found
        num_ties += ties
        start += len(group)
    return LabelledPairs(pairs, samples, scores, num_ties, num_too_long)


def label_splits(
    data: Path,
    sft: Path,
    gold: Scorer | None,
    config: PairsConfig,
    generation: GenerationConfig,
    workdir: Path,
) -> dict[Split, LabelledPairs]:
    """Labelled pairs of the training and validation prompts.

    Args:
        data: directory of the data artifact.
        sft: model directory that samples and whose tokenizer is used.
        gold: labels samples; None where people labelled.
        config: section `pairs`.
        generation: section `generation`.
        workdir: where servers write their logs.

    Raises:
        SettingError: neither human pairs nor a gold scorer, so nothing can say what is better.
        InputError: no training prompt is within `max_prompt_tokens`.
    """
    tokenizer = load_tokenizer(sft)
    human = {split: read_pairs(data, split) for split in LABELLED}
    if gold is None and human["train"] is None:
        raise SettingError("data.task.gold is none and the task has no pairs; name a gold scorer that labels samples")
    labelled: dict[Split, LabelledPairs] = {}
    settings = GeneratorSettings(seed=config.seed)
    # Before the generator starts, which takes a minute.
    asked = {
        split: _make_requests(read_prompts(data, split), split, tokenizer, generation, config) for split in LABELLED
    }
    with start_generator(sft, generation, log_dir=workdir, settings=settings) as generator:
        for split in LABELLED:
            pairs, (requests, too_long) = human[split], asked[split]
            if pairs is None:
                assert gold is not None
                labelled[split] = label_samples(generator, gold, requests, too_long, config)
                continue
            kept, num_ties = label_human_pairs(pairs, tokenizer, gold, config)
            centring = requests[:NUM_CENTRING_PROMPTS] if split == "train" else []
            groups = generate(generator, centring, SamplingPlan(1))
            samples = [completion for group in groups for completion in group]
            labelled[split] = LabelledPairs(kept, samples, [], num_ties, too_long)
    warn_without_pairs(labelled)
    return labelled


def label_human_pairs(
    pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, gold: Scorer | None, config: PairsConfig
) -> tuple[list[TokenPair], int]:
    """A task's own pairs as token ids, relabelled by gold if asked for; and how many ties that dropped.

    Raises:
        SettingError: relabelling without a gold scorer.
    """
    encoded = [_encode_pair(pair, tokenizer) for pair in pairs]
    if not config.relabel:
        return encoded, 0
    if gold is None:
        raise SettingError("pairs.relabel=true needs a gold scorer, but data.task.gold is none")
    relabelled = [_relabel(pair, tokenizer, gold) for pair in encoded]
    kept = [pair for pair in relabelled if pair is not None]
    return kept, len(relabelled) - len(kept)


def warn_without_pairs(labelled: Mapping[Split, LabelledPairs]) -> None:
    """Not an error here: a task with a rule trains no reward model, and stage train_reward refuses for the others."""
    for split, result in labelled.items():
        if result.pairs:
            continue
        if result.num_ties:
            logger.warning(
                "no pairs: the completions of each prompt all score alike split=%s num_ties=%d", split, result.num_ties
            )
        else:
            logger.warning(
                "no pairs: the task has none, or no prompt fits into generation.max_prompt_tokens split=%s "
                "num_prompts_too_long=%d",
                *(split, result.num_prompts_too_long),
            )


def _make_requests(
    prompts: Sequence[Prompt],
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    generation: GenerationConfig,
    config: PairsConfig,
) -> tuple[list[Request], int]:
    """As `make_requests`; without one of the training prompts there is nothing to label or centre on."""
    requests, too_long = make_requests(prompts, tokenizer, generation, config.seed)
    if split == "train" and not requests:
        raise InputError(
            f"artifacts/data: no training prompt fits into generation.max_prompt_tokens={generation.max_prompt_tokens}"
        )
    return requests, too_long


def _encode_pair(pair: Pair, tokenizer: PreTrainedTokenizerBase) -> TokenPair:
    return TokenPair(
        prompt_id=pair.prompt.prompt_id,
        prompt_ids=encode_prompt(tokenizer, pair.prompt),
        chosen_ids=encode_completion(tokenizer, pair.chosen),
        rejected_ids=encode_completion(tokenizer, pair.rejected),
        chosen_text=pair.chosen,
        rejected_text=pair.rejected,
    )


def _relabel(pair: TokenPair, tokenizer: PreTrainedTokenizerBase, gold: Scorer) -> TokenPair | None:
    completions = [
        Completion(
            prompt_id=pair.prompt_id,
            sample_index=index,
            is_greedy=False,
            prompt_ids=pair.prompt_ids,
            token_ids=ids,
            sampling_logprobs=(),
            text=decode_completion(tokenizer, ids),
            is_finished=True,
            first_policy_version=0,
            last_policy_version=0,
        )
        for index, ids in enumerate((pair.chosen_ids, pair.rejected_ids))
    ]
    chosen, rejected = gold.score(completions)
    if chosen == rejected:
        return None
    if chosen > rejected:
        return replace(pair, chosen_score=chosen, rejected_score=rejected)
    return replace(
        pair,
        chosen_ids=pair.rejected_ids,
        rejected_ids=pair.chosen_ids,
        chosen_text=pair.rejected_text,
        rejected_text=pair.chosen_text,
        chosen_score=rejected,
        rejected_score=chosen,
    )
