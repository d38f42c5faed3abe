"""The learned reward model as a scorer. It reads token ids, never text."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from stages.common.errors import InputError
from stages.data.batches import SharedSize, collate, split_by_prompts, split_by_tokens
from stages.data.records import Completion
from stages.data.text import TokenSequence
from stages.models.load import freeze, move, require_model_directory, select_device
from stages.models.reward_model import RANGE, compute_scores, load_reward_model
from stages.models.shared_prompts import can_share_prompts


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
        self._can_share_prompts = can_share_prompts(self._model)

    @torch.no_grad()
    def score(self, completions: Sequence[Completion]) -> list[float]:
        """Shifted scores: 0 is the mean of SFT samples."""
        scores = [0.0] * len(completions)
        # A prompt that several have is read once: half the tokens of short completions. Else that is a pass too many.
        shares = self._can_share_prompts and len({item.prompt_ids for item in completions}) < len(completions)
        for rows in self._split(completions, share_prompts=shares):
            sequences = [TokenSequence(completions[row].prompt_ids, completions[row].token_ids) for row in rows]
            batch = collate(sequences, select_device(), share_prompts=shares)
            for row, value in zip(rows, compute_scores(self._model, batch).tolist(), strict=True):
                scores[row] = value
        return scores

    def _split(self, completions: Sequence[Completion], *, share_prompts: bool) -> list[list[int]]:
        """Rows of each forward pass."""
        if not share_prompts:
            lengths = [len(item.prompt_ids) + len(item.token_ids) for item in completions]
            return split_by_tokens(lengths, self._micro_batch_tokens)
        numbers: dict[tuple[int, ...], int] = {}
        sizes = [
            SharedSize(
                prompt=numbers.setdefault(item.prompt_ids, len(numbers)),
                prompt_tokens=len(item.prompt_ids),
                rows=1,
                completion_tokens=len(item.token_ids),
            )
            for item in completions
        ]
        return split_by_prompts(sizes, self._micro_batch_tokens)
