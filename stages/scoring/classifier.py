"""A text classifier as a scorer: it reads text, so its tokenizer need not be the policy's.

classifier.json beside a copy of the classifier and of the policy's tokenizer is what artifacts/reward holds where a
classifier takes the reward model's place:

    {"format": 1, "label": "POSITIVE", "score": "logprob", "with_prompt": true, "score_range": [lowest, highest]}

Shapes: B texts, L labels.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from stages.common.errors import InputError
from stages.common.publish import write_json
from stages.data.batches import split_by_tokens
from stages.data.records import Completion
from stages.data.scorers import ClassifierScorer as ClassifierSettings
from stages.data.text import TokenSequence, decode_completion
from stages.models.load import PICKLES, freeze, load_model, load_tokenizer, move, select_device

CLASSIFIER = "classifier.json"
FORMAT = 1
MODEL, TOKENIZER = "model", "policy_tokenizer"
"""Folders beside it."""
_KEPT = ("label", "score", "with_prompt")
MAX_TOKENS = 4096
"""Padded tokens of one forward pass."""


def is_classifier(path: Path) -> bool:
    """Whether an artifact holds a classifier: artifacts/reward then holds no model that was trained here."""
    return (path / CLASSIFIER).is_file()


class ClassifierScorer:
    """The score of one label for the text of a prompt and its completion.

    Args:
        settings: where the classifier is, and what is read of it.
        policy_tokenizer: turns token ids back into text.

    Raises:
        InputError: no readable classifier, or none with this label.
    """

    def __init__(self, settings: ClassifierSettings, policy_tokenizer: PreTrainedTokenizerBase) -> None:
        path = Path(settings.path)
        self._settings = settings
        self._policy_tokenizer = policy_tokenizer
        self._model = move(load_model(AutoModelForSequenceClassification, path, torch.float32), select_device())
        freeze(self._model)
        self._label = _find_label(self._model, settings)
        self._tokenizer = _prepare_tokenizer(load_tokenizer(path), self._model)
        limits = (self._tokenizer.model_max_length, _count_positions(self._model))
        self._max_length = min(limit for limit in limits if limit is not None)

    def score(self, completions: Sequence[Completion]) -> list[float]:
        """One score per completion, in order; finished or not plays no part."""
        return self.score_sequences([TokenSequence(item.prompt_ids, item.token_ids) for item in completions])

    @torch.no_grad()
    def score_sequences(self, sequences: Sequence[TokenSequence]) -> list[float]:
        """The same of token ids of the policy."""
        encoded = self._tokenizer(
            [self._write(sequence) for sequence in sequences], truncation=True, max_length=self._max_length
        )["input_ids"]
        scores = [0.0] * len(sequences)
        for group in split_by_tokens([len(ids) for ids in encoded], MAX_TOKENS):
            batch = self._tokenizer.pad({"input_ids": [encoded[index] for index in group]}, return_tensors="pt")
            inputs = {name: batch[name].to(select_device()) for name in ("input_ids", "attention_mask")}
            values = self._read(self._model(**inputs).logits.float())
            for index, value in zip(group, values.tolist(), strict=True):
                scores[index] = value
        return scores

    def _write(self, sequence: TokenSequence) -> str:
        prompt_ids = sequence.prompt_ids if self._settings.with_prompt else ()
        text = decode_completion(self._policy_tokenizer, (*prompt_ids, *sequence.completion_ids))
        return text or " "  # without a token there would be nothing to read the score at

    def _read(self, logits: Tensor) -> Tensor:
        """[B, L] -> [B]"""
        match self._settings.score:
            case "logit":
                return logits[:, self._label]
            case "logprob":
                return logits.log_softmax(dim=-1)[:, self._label]
            case "probability":
                return logits.softmax(dim=-1)[:, self._label]


def write_classifier(
    directory: Path, settings: ClassifierSettings, policy: Path, score_range: tuple[float, float]
) -> None:
    """Copy a classifier into an artifact, with what is needed to read it.

    Args:
        directory: an artifact that is being written.
        settings: whose classifier.
        policy: model directory whose tokenizer made the token ids.
        score_range: lowest and highest score of the SFT model's samples.
    """
    # Weights are read from safetensors alone.
    shutil.copytree(settings.path, directory / MODEL, ignore=shutil.ignore_patterns(*(f"*{end}" for end in PICKLES)))
    load_tokenizer(policy).save_pretrained(directory / TOKENIZER)
    kept = settings.model_dump(include=set(_KEPT))
    write_json(directory / CLASSIFIER, {"format": FORMAT, **kept, "score_range": list(score_range)})


def read_classifier(directory: Path) -> ClassifierScorer:
    """The scorer that `write_classifier` wrote down.

    Raises:
        InputError: it is damaged.
    """
    content = _read_content(directory)
    settings = ClassifierSettings(path=str(directory / MODEL), **{name: content[name] for name in _KEPT})
    return ClassifierScorer(settings, load_tokenizer(directory / TOKENIZER))


def read_classifier_range(directory: Path) -> tuple[float, float]:
    """Lowest and highest score of the SFT model's samples.

    Raises:
        InputError: the artifact is damaged.
    """
    low, high = _read_content(directory)["score_range"]
    return float(low), float(high)


def _read_content(directory: Path) -> dict[str, Any]:
    path = directory / CLASSIFIER
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise InputError(f"{path}: not valid JSON: {error}") from error
    wanted = {"format", *_KEPT, "score_range"}
    if not isinstance(content, dict) or content.keys() != wanted or content["format"] != FORMAT:
        raise InputError(f"{path}: is not what train_reward writes; run that stage again (dvc repro)")
    return content


def _count_positions(model: PreTrainedModel) -> int | None:
    """Tokens that it can read; None: its config has no limit.

    In RoBERTa and its kin the first position comes after the padding's.
    """
    limit: int | None = getattr(model.config, "max_position_embeddings", None)
    if limit is None:
        return None
    names = (name for name, _ in model.named_modules() if name.endswith("position_embeddings"))
    padding = next((getattr(model.get_submodule(name), "padding_idx", None) for name in names), None)
    return limit if padding is None else limit - int(padding) - 1


def _find_label(model: PreTrainedModel, settings: ClassifierSettings) -> int:
    labels = {int(number): str(label) for number, label in (model.config.id2label or {}).items()}
    if len(labels) == 1 and settings.score != "logit":
        raise InputError(
            f"{settings.path}: has one output, of which score={settings.score!r} is no number; set 'logit'"
        )
    for number, label in labels.items():
        if label == settings.label:
            return number
    raise InputError(f"{settings.path}: has no label {settings.label!r}; allowed: {', '.join(labels.values())}")


def _prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    tokenizer.truncation_side = "left"  # the completion is at the right
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # Some classifiers (GPT-2's) find the last token by it.
    model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer
