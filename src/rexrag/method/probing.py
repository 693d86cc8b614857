"""Which dead ends are probed, and with which cue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rexrag.errors import CueError, MethodError


@dataclass(frozen=True, slots=True)
class ProbePlan:
    """Cut the base rollout `parent` and go on after cue `cue` (None: go on without one)."""

    parent: int
    cue: int | None


def plan_probes(
    dead_ends: Sequence[int], probability: float, pool_size: int | None, generator: torch.Generator
) -> list[ProbePlan]:
    """Toss one coin for each dead end and draw one cue uniformly [METHOD §2.3, §2.4].

    dead_ends: indices of base rollouts; pool_size: number of cues, None to continue without a cue.
    The draws for a dead end do not depend on the coins of the others, so that arms which share a generator
    seed probe the same rollouts. Raises MethodError, CueError.
    """
    if not 0.0 <= probability <= 1.0:
        raise MethodError(f"probability = {probability}, expected [0, 1]")
    if pool_size is not None and pool_size < 1:
        raise CueError(f"pool_size = {pool_size}, expected at least one cue")
    coins = torch.rand(len(dead_ends), generator=generator)
    cues = torch.randint(pool_size or 1, (len(dead_ends),), generator=generator)
    return [
        ProbePlan(parent, None if pool_size is None else int(cue))
        for parent, coin, cue in zip(dead_ends, coins.tolist(), cues.tolist(), strict=True)
        if coin < probability
    ]


def in_all_wrong_groups(right: Sequence[bool], groups: Sequence[int]) -> list[bool]:
    """For each base rollout: did no rollout of its group get it right?"""
    solved = {group for group, is_right in zip(groups, right, strict=True) if is_right}
    return [group not in solved for group in groups]


HALF_LIFE = 32
"""Probes after which an observed success counts half."""


def update_probe_success(mean: float, right: int, drawn: int) -> float:
    """Exponential mean of the probes' success, filtered ones too; unchanged by a step that drew none.

    Raises MethodError.
    """
    if not 0 <= right <= drawn:
        raise MethodError(f"right = {right}, drawn = {drawn}: expected 0 <= right <= drawn")
    old = 0.5 ** (drawn / HALF_LIFE)
    return mean if drawn == 0 else old * mean + (1.0 - old) * (right / drawn)


def adaptive_probability(probability: float, success: float, target: float) -> float:
    """p for the next step: falls in proportion once `success` is below `target`, to an eighth at most.

    A p of zero would never see a success again. target 0: p stays. Raises MethodError.
    """
    if not (0.0 <= probability <= 1.0 and 0.0 <= success <= 1.0 and 0.0 <= target <= 1.0):
        raise MethodError(
            f"probability = {probability}, success = {success}, target = {target}: not in [0, 1]"
        )
    return probability if target == 0.0 else probability * min(1.0, max(success / target, 0.125))
