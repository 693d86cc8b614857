"""Group-relative advantages: the reward of a rollout relative to its group."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rexrag.errors import MethodError, ShapeError
from rexrag.method.checks import require_finite, require_shape

STD_EPSILON = 1e-6


def group_advantages(
    rewards: Tensor,
    groups: Tensor,
    scale: Literal["std", "none"] = "std",
    baseline: Literal["mean", "leave-one-out"] = "mean",
) -> Tensor:
    """(r − baseline) / (std + 1e-6) within each group; REX-RAG §3.3, GRPO (arXiv 2402.03300 Eq. 4).

    rewards: float [B]; groups: int64 [B], equal for rollouts of one question (base and kept probes alike).
    The standard deviation is unbiased. scale "none": no division (Dr. GRPO). baseline "leave-one-out":
    mean of the others (RLOO). A group of one, and a group of equal rewards, gets exactly 0.

    Returns float [B] in the rewards' dtype. Raises ShapeError, NonFiniteError, MethodError.
    """
    if rewards.dim() != 1:
        raise ShapeError(f"rewards has shape {tuple(rewards.shape)}, expected [B]")
    require_shape("groups", groups, rewards.shape)
    require_finite("rewards", rewards)
    if scale not in ("std", "none") or baseline not in ("mean", "leave-one-out"):
        raise MethodError(f"scale = {scale!r}, baseline = {baseline!r}: unknown")
    r = rewards.double()
    _, index = torch.unique(groups, return_inverse=True)
    count = torch.bincount(index).double()
    centred = r - (torch.zeros_like(count).index_add_(0, index, r) / count)[index]
    low = torch.full_like(count, torch.inf).scatter_reduce_(0, index, r, "amin")
    high = torch.full_like(count, -torch.inf).scatter_reduce_(0, index, r, "amax")
    # Rounding of the mean must not turn a group without signal into one with a huge scaled advantage.
    centred = torch.where((low == high)[index], 0.0, centred)
    others = (count - 1).clamp(min=1)
    advantage = centred * (count / others)[index] if baseline == "leave-one-out" else centred
    if scale == "std":
        variance = torch.zeros_like(count).index_add_(0, index, centred.square()) / others
        advantage = advantage / (variance.sqrt() + STD_EPSILON)[index]
    return advantage.to(rewards.dtype if rewards.is_floating_point() else torch.float32)
