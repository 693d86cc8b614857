"""Which probes are kept for training."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rexrag.config.algorithms import Probing, Shared
from rexrag.errors import MethodError, ShapeError
from rexrag.method.checks import require_finite, require_shape
from rexrag.types import Origin, RolloutGroup


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


def filter_probes(
    groups: Sequence[RolloutGroup], algorithm: Shared, generator: torch.Generator
) -> tuple[RolloutGroup, ...]:
    """The groups with `score` and `kept` of every probe: the best ⌊ρ·N_base⌋ of the batch [METHOD §3].

    `filter` "cue-logp" ranks by `cue_scores`, "right" keeps correct probes only and ranks by chance, "none"
    keeps all. Probes without a cue are ranked by chance.
    """
    if not isinstance(algorithm, Probing):
        return tuple(groups)
    probes = [probe for group in groups for probe in group.probes]
    scores = torch.rand(len(probes), generator=generator)
    if algorithm.filter != "right" and any(probe.cue_length for probe in probes):
        rollouts = [probe.rollout for probe in probes]
        scores = cue_scores(
            pad_sequence([torch.tensor(r.logps) for r in rollouts], True),
            pad_sequence([torch.tensor(r.origins) for r in rollouts], True, int(Origin.POLICY)),
        )
    base = sum(len(group.rollouts) for group in groups)
    keep = len(probes) if algorithm.filter == "none" else keep_count(base, algorithm.keep_ratio)
    allowed = [algorithm.filter != "right" or probe.rollout.correct for probe in probes]
    group_of = [index for index, group in enumerate(groups) for _ in group.probes]
    kept = keep_probes(scores, keep, allowed, group_of, algorithm.keep_per_group).tolist()
    ranked = iter(
        replace(probe, score=score, kept=keep)
        for probe, score, keep in zip(probes, scores.tolist(), kept, strict=True)
    )
    return tuple(replace(group, probes=tuple(next(ranked) for _ in group.probes)) for group in groups)


def groups_with_signal(groups: Sequence[RolloutGroup], algorithm: Shared, generator: torch.Generator) -> int:
    """How many groups would differ in reward after the filter; the generator is left as it is."""
    copied = torch.Generator().set_state(generator.get_state())
    return sum(group.has_signal for group in filter_probes(groups, algorithm, copied))
