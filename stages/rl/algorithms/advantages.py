"""Baselines and scales of advantages: what is subtracted from rewards, and what they are divided by.

Shapes: B completions, T completion tokens, right-padded.
"""

import torch
from torch import Tensor

from stages.rl.records import Rollout
from stages.rl.tensors import require_shape


def rows_by_group(rollout: Rollout) -> list[list[int]]:
    """The sampled completions of each prompt, by their places in the rollout; the greedy ones are left out."""
    members: list[list[int]] = [[] for _ in range(int(rollout.groups.max()) + 1)]
    is_greedy = rollout.is_greedy.tolist()
    for row, group in enumerate(rollout.groups.tolist()):
        if not is_greedy[row]:
            members[group].append(row)
    return members


def group_mean(values: Tensor, groups: Tensor) -> Tensor:
    """Mean over the values of the same group. [B], [B] -> [B]"""
    total, count, of_row = _sum_groups(values, groups)
    return (total / count)[of_row]


def group_std(values: Tensor, groups: Tensor) -> Tensor:
    """Standard deviation within the group, with n − 1; 0 where a group has one member. [B], [B] -> [B]"""
    centred = values - group_mean(values, groups)
    total, count, of_row = _sum_groups(centred.square(), groups)
    return (total / (count - 1).clamp(min=1)).sqrt()[of_row]


def leave_one_out(values: Tensor, groups: Tensor) -> Tensor:
    """Mean over the *other* values of the same group: a baseline that does not depend on the value itself. [B] -> [B]

    Raises:
        ValueError: a group has one member.
    """
    total, count, of_row = _sum_groups(values, groups)
    if int(count.min()) < 2:
        raise ValueError("a leave-one-out baseline needs at least 2 samples of each prompt")
    return (total[of_row] - values) / (count[of_row] - 1)


def mean_of_other_groups(values: Tensor, groups: Tensor) -> Tensor:
    """Mean over the values of all other groups; 0 where there is no other. [B], [B] -> [B]"""
    total, count, of_row = _sum_groups(values, groups)
    others = (values.numel() - count).clamp(min=1)
    return ((values.sum() - total) / others)[of_row] * (len(count) > 1)


def whiten(per_token: Tensor, completion_mask: Tensor) -> Tensor:
    """Over all tokens of the batch: mean 0, standard deviation 1; 0 on padding. [B, T] -> [B, T]"""
    require_shape("completion_mask", completion_mask, per_token.shape)
    # The mean of equal numbers need not be that number; measured from one of them all are 0, and so is their mean.
    centred = per_token - per_token[completion_mask][0]
    kept = centred[completion_mask]
    whitened = (centred - kept.mean()) / (kept.std(correction=0) + 1e-8)
    return torch.where(completion_mask, whitened, 0.0)


def put_at_end(per_completion: Tensor, completion_mask: Tensor) -> Tensor:
    """A completion's number at its last token, 0 elsewhere. [B], [B, T] -> [B, T]"""
    require_shape("per_completion", per_completion, completion_mask.shape[:1])
    last = completion_mask.long().sum(dim=1) - 1  # [B]
    at_end = torch.arange(completion_mask.shape[1], device=last.device) == last[:, None]  # [B, T]
    return torch.where(at_end, per_completion[:, None], 0.0)


def _sum_groups(values: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum and count of each group, and the group's place for each row."""
    require_shape("groups", groups, values.shape)
    _, of_row, count = groups.unique(return_inverse=True, return_counts=True)
    total = torch.zeros(len(count), dtype=values.dtype, device=values.device).index_add(0, of_row, values)
    return total, count, of_row
