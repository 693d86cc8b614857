"""Which probes to keep: the plausible ones, as the policy itself rates their cue."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from rexrag.errors import MethodError, ShapeError
from rexrag.method.checks import require_finite, require_shape
from rexrag.types import Origin


def cue_scores(policy_logp: Tensor, origin: Tensor) -> Tensor:
    """Mean log π_old over the CUE tokens of each probe: float [K] from [K, T] and int [K, T]; REX-RAG Eq. 4.

    A probe without a cue scores 0. Raises ShapeError, NonFiniteError (at a CUE token).
    """
    require_shape("origin", origin, policy_logp.shape)
    is_cue = origin == int(Origin.CUE)
    values = torch.where(is_cue, policy_logp, 0.0)
    require_finite("policy_logp", values)
    return values.sum(dim=-1) / is_cue.sum(dim=-1).clamp(min=1)


def keep_count(base_rollouts: int, keep_ratio: float) -> int:
    """⌊ρ·N_base⌋ over the batch [METHOD §3], safe against 0.29·100 = 28.999…"""
    if base_rollouts < 0 or not 0.0 <= keep_ratio <= 1.0:
        raise MethodError(
            f"base_rollouts = {base_rollouts}, keep_ratio = {keep_ratio}: expected >= 0 and [0, 1]"
        )
    return math.floor(keep_ratio * base_rollouts + 1e-9)


def keep_probes(
    scores: Tensor,
    keep: int,
    allowed: Sequence[bool] | None = None,
    groups: Sequence[int] | None = None,
    per_group: int = 0,
) -> Tensor:
    """The `keep` highest scores: bool [K]; among equal scores the earlier probe wins.

    allowed: probes that may be kept at all, None for all. groups: the question of each probe; at most
    `per_group` of one are kept (0: no limit). Raises ShapeError, NonFiniteError, MethodError (keep < 0).
    """
    if scores.dim() != 1:
        raise ShapeError(f"scores has shape {tuple(scores.shape)}, expected [K]")
    if keep < 0:
        raise MethodError(f"keep = {keep}, expected >= 0")
    require_finite("scores", scores)
    kept = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    of_group: Counter[int] = Counter()
    for index in torch.argsort(scores, descending=True, stable=True).tolist():
        if keep == 0:
            break
        group = index if groups is None else groups[index]
        if (allowed is None or allowed[index]) and not (per_group and of_group[group] >= per_group):
            kept[index] = True
            of_group[group] += 1
            keep -= 1
    return kept


def update_probe_accuracy(mean: float, right: int, kept: int, momentum: float = 0.1) -> float:
    """Exponential mean of the kept probes' accuracy; unchanged by a step that kept none [METHOD §3]."""
    return mean if kept == 0 else (1.0 - momentum) * mean + momentum * (right / kept)


def adaptive_keep_ratio(mean: float, keep_ratio: float, floor: float) -> float:
    """ρ for the next step: the mean accuracy, capped by `keep_ratio` and never below `floor`.

    The mean is seeded with `keep_ratio`. Without a floor ρ can reach zero, and a filter that keeps nothing
    never sees an accuracy again.
    """
    if not 0.0 <= floor <= keep_ratio <= 1.0:
        raise MethodError(f"floor = {floor}, keep_ratio = {keep_ratio}: expected 0 <= floor <= ratio <= 1")
    return min(max(mean, floor), keep_ratio)
