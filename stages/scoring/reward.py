"""The learned reward model as a scorer. It reads token ids, never text."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch.nn.utils.rnn import pad_sequence

from stages.common.errors import InputError
from stages.data.batches import collate, split_by_tokens
from stages.data.records import Completion
from stages.data.text import TokenSequence
from stages.models.load import freeze, move, require_model_directory, select_device
from stages.models.reward_model import RANGE, compute_scores, compute_shared_scores, load_reward_model


def read_sft_range(path: Path) -> tuple[float, float]:
    """Lowest and highest score the reward model gave to SFT samples.

    Raises:
        InputError: the directory holds no reward model of this project.
    """
    require_model_directory(path)
    found = json.loads((path / "config.json").read_text(encoding="utf-8")).get(RANGE)
    if found is None:
        raise InputError(f"{path}: config.json has no {RANGE!r}, so it was not written by train_reward")
    low, high = found
    return float(low), float(high)


class RewardScorer:
    """Scores prompt and completion at the completion's last token.

    Args:
        path: directory of the reward model.
        dtype: of weights and compute.
        micro_batch_tokens: padded tokens of one forward pass.
    """

    def __init__(
        self,
        path: Path,
        dtype: Literal["bf16", "fp32"],
        micro_batch_tokens: int,
    ) -> None:
        weights = torch.bfloat16 if dtype == "bf16" else torch.float32
        self._model = move(load_reward_model(path, weights), select_device())
        freeze(self._model)
        self._micro_batch_tokens = micro_batch_tokens

    @torch.no_grad()
    def score(self, completions: Sequence[Completion]) -> list[float]:
        """Shifted scores: 0 is the mean of SFT samples."""
        if select_device().type == "cpu":
            return self._score_by_prompt(completions)
        sequences = [TokenSequence(item.prompt_ids, item.token_ids) for item in completions]
        scores = [0.0] * len(sequences)
        for group in split_by_tokens([len(sequence) for sequence in sequences], self._micro_batch_tokens):
            batch = collate([sequences[index] for index in group], select_device())
            values = compute_scores(self._model, batch.input_ids, batch.attention_mask)
            for index, value in zip(group, values.tolist(), strict=True):
                scores[index] = value
        return scores

    def _score_by_prompt(self, completions: Sequence[Completion]) -> list[float]:
        """Prompt by prompt: on CPU small batches cost nothing, and reading a prompt once saves half the tokens."""
        rows: dict[tuple[int, ...], list[int]] = {}
        for row, item in enumerate(completions):
            rows.setdefault(item.prompt_ids, []).append(row)
        scores = [0.0] * len(completions)
        for prompt_ids, members in rows.items():
            longest = max(len(completions[row].token_ids) for row in members)
            most = max(1, self._micro_batch_tokens // (len(prompt_ids) + longest))
            for start in range(0, len(members), most):
                part = members[start : start + most]
                values = self._score_part(prompt_ids, [completions[row].token_ids for row in part])
                for row, value in zip(part, values, strict=True):
                    scores[row] = value
        return scores

    def _score_part(self, prompt_ids: tuple[int, ...], token_ids: list[tuple[int, ...]]) -> list[float]:
        ids = pad_sequence([torch.tensor(row) for row in token_ids], batch_first=True)  # [B, T]
        lengths = torch.tensor([len(row) for row in token_ids])
        mask = torch.arange(ids.shape[1]) < lengths[:, None]  # [B, T]
        return list(compute_shared_scores(self._model, torch.tensor(prompt_ids), ids, mask).tolist())
