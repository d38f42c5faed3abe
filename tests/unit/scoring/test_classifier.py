"""A classifier as a scorer: what it reads, which of its numbers it gives, and what is refused."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from stages.common.errors import InputError
from stages.data.records import Completion
from stages.data.scorers import ClassifierScorer as ClassifierSettings
from stages.data.token_pairs import TokenPair
from stages.reward.classifier import measure_classifier, publish_classifier
from stages.scoring.classifier import ClassifierScorer
from stages.scoring.load import holds_reward_model, load_scorer, read_score_range
from stages.scoring.start import start_classifier, start_scorer
from tests.fakes import make_completion
from tests.tiny import save_tiny_model, tiny_tokenizer
from tests.toy_models import CLASSIFIER_CONTEXT, save_toy_classifier, save_toy_model

TEXTS = ("was good", " and great", "", " much too long for it")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "policy")


@pytest.fixture(scope="module")
def path(policy: Path) -> Path:
    return save_toy_classifier(policy.with_name("classifier"))


def start(path: Path, policy: Path, **settings: Any) -> ClassifierScorer:
    return start_classifier(ClassifierSettings(path=str(path), **{"label": "POSITIVE"} | settings), policy)


def complete(text: str, prompt: str = "a film ") -> Completion:
    prompt_ids, token_ids = (tuple(tiny_tokenizer()(part)["input_ids"]) for part in (prompt, text))
    return replace(make_completion(text), prompt_ids=prompt_ids, token_ids=(*token_ids, 258), text=text)


def read_alone(path: Path, text: str) -> torch.Tensor:
    """Logits of the library for one text. [2]"""
    tokenizer = AutoTokenizer.from_pretrained(path, truncation_side="left")
    inputs = tokenizer(text, truncation=True, max_length=CLASSIFIER_CONTEXT, return_tensors="pt")
    model = AutoModelForSequenceClassification.from_pretrained(path, attn_implementation="eager")
    with torch.no_grad():
        logits: torch.Tensor = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[0]
    return logits


def test_scores_in_a_batch_are_those_of_prompt_and_completion_as_one_text(path: Path, policy: Path) -> None:
    found = start(path, policy).score([complete(text) for text in TEXTS])

    expected = [read_alone(path, f"a film {text}").log_softmax(-1)[1].item() for text in TEXTS]
    assert found == pytest.approx(expected, abs=1e-5)
    assert len({round(score, 4) for score in found}) == len(TEXTS)


def test_a_classifier_can_be_told_to_read_the_completion_alone(path: Path, policy: Path) -> None:
    scorer = start(path, policy, with_prompt=False)

    one, other = scorer.score([complete("was good", prompt) for prompt in ("a film ", "the food ")])

    assert one == other


def test_logit_logprob_and_probability_are_of_the_named_label(path: Path, policy: Path) -> None:
    negative, positive = read_alone(path, "a film was good").tolist()

    found = {
        score: start(path, policy, label="NEGATIVE", score=score).score([complete("was good")])[0]
        for score in ("logit", "logprob", "probability")
    }

    share = math.exp(negative) / (math.exp(negative) + math.exp(positive))
    assert found == pytest.approx({"logit": negative, "logprob": math.log(share), "probability": share}, abs=1e-5)


def test_a_label_that_the_classifier_has_not_is_refused_with_those_it_has(path: Path, policy: Path) -> None:
    with pytest.raises(InputError, match=r"classifier: has no label 'HAPPY'; allowed: NEGATIVE, POSITIVE"):
        start(path, policy, label="HAPPY")


def test_probabilities_of_a_single_output_are_refused(tmp_path: Path, policy: Path) -> None:
    single = save_toy_model("openai-community/gpt2", tmp_path / "single", num_labels=1)

    with pytest.raises(InputError, match=r"single: has one output, of which score='logprob' is no number; set 'logit'"):
        start(single, policy, label="LABEL_0")


def test_a_classifier_without_a_pad_token_scores_a_batch_as_it_scores_each_alone(tmp_path: Path, policy: Path) -> None:
    scorer = start(save_toy_model("openai-community/gpt2", tmp_path, num_labels=2), policy, label="LABEL_1")
    completions = [complete(text) for text in TEXTS]

    alone = [scorer.score([completion])[0] for completion in completions]

    assert scorer.score(completions) == pytest.approx(alone, abs=1e-5)


def test_a_classifier_whose_positions_start_after_the_paddings_is_given_no_more_than_it_can_read(
    path: Path, policy: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(path)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=18, pad_token_id=1, **sizes)
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    scores = start(tmp_path, policy, label="LABEL_1").score([complete("a" * length) for length in (2, 30)])

    assert all(math.isfinite(score) for score in scores)


def test_a_published_classifier_is_read_back_from_its_copy_alone(tmp_path: Path, policy: Path) -> None:
    original, reward = save_toy_classifier(tmp_path / "classifier"), tmp_path / "reward"
    reward.mkdir()
    samples = [complete(text) for text in TEXTS]
    settings = ClassifierSettings(path=str(original), label="POSITIVE", score="logit", with_prompt=False)

    publish_classifier(settings, policy, samples, reward)

    started = start_scorer(settings, policy, tmp_path)
    assert started is not None
    scores = started.score(samples)
    original.rename(tmp_path / "gone")
    assert load_scorer(reward, "bf16", 64).score(samples) == scores
    assert read_score_range(reward) == (min(scores), max(scores))
    assert not holds_reward_model(reward)


def test_a_classifier_agrees_with_a_pair_whose_better_side_scores_higher(path: Path, policy: Path) -> None:
    scorer = start(path, policy)
    items = sorted((complete(text) for text in TEXTS), key=lambda item: scorer.score([item])[0])
    low, high = items[0], items[-1]
    pairs = [
        TokenPair("p", low.prompt_ids, chosen.token_ids, rejected.token_ids, chosen.text, rejected.text)
        for chosen, rejected in ((high, low), (high, low), (low, high), (low, low))
    ]

    accuracy = measure_classifier(scorer, pairs, seed=0)

    assert accuracy is not None
    assert accuracy.value == pytest.approx(0.625)  # (1 + 1 + 0 + 0.5) / 4
    assert measure_classifier(scorer, [], seed=0) is None
