"""Which dead ends are probed, with which cue, and how p depends on the share of right probes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from rexrag.config.algorithms import Probing, Shared
from rexrag.errors import CueError, MethodError
from rexrag.method.dead_ends import Judge, find_dead_ends
from rexrag.types import Probe, Rollout, RolloutGroup


@dataclass(frozen=True, slots=True, eq=False)
class ProbePlan:
    """Cut `parent` and continue after cue number `cue` of the pool (None: without a cue)."""

    parent: Rollout
    cue: int | None


def plan_probes(
    dead_ends: Sequence[Rollout], probability: float, pool_size: int | None, generator: torch.Generator
) -> list[ProbePlan]:
    """Draw for each dead end whether it is probed, and its cue uniformly [METHOD §2.3, §2.4].

    pool_size: number of cues, None to continue without a cue. The draws for a dead end do not depend on the
    coins of the others, so that runs which share a generator seed probe the same rollouts.
    Raises MethodError, CueError.
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


def plan(
    groups: Sequence[RolloutGroup],
    algorithm: Shared,
    pool_size: int | None,
    generator: torch.Generator,
    judge: Judge | None = None,
) -> list[ProbePlan]:
    """Which base rollouts are probed, and with which cue [METHOD §2.2–2.4]."""
    if not isinstance(algorithm, Probing):
        return []
    kinds = () if algorithm.dead_ends == "judge" else algorithm.dead_ends
    dead_ends = find_dead_ends(groups, kinds, algorithm.probe_groups, judge)
    return plan_probes(dead_ends, algorithm.probe_probability, pool_size, generator)


def with_probes(groups: Sequence[RolloutGroup], probes: Sequence[Probe]) -> tuple[RolloutGroup, ...]:
    """The groups with these probes, each in the group of its parent."""
    by_parent = {id(probe.parent): probe for probe in probes}
    return tuple(
        replace(group, probes=tuple(by_parent[id(r)] for r in group.rollouts if id(r) in by_parent))
        for group in groups
    )


HALF_LIFE = 32
"""Number of probes after which an earlier result has half its weight."""


def update_probe_success(mean: float, right: int, drawn: int) -> float:
    """Exponential mean of the share of right probes, kept or not; unchanged by a step without probes.

    Raises MethodError.
    """
    if not 0 <= right <= drawn:
        raise MethodError(f"right = {right}, drawn = {drawn}: expected 0 <= right <= drawn")
    old = 0.5 ** (drawn / HALF_LIFE)
    return mean if drawn == 0 else old * mean + (1.0 - old) * (right / drawn)


def adaptive_probability(probability: float, success: float, target: float) -> float:
    """p for the next step: falls in proportion once `success` is below `target`, to an eighth at most.

    p does not reach 0, since then no probe could raise it again. target 0: p stays. Raises MethodError.
    """
    if not (0.0 <= probability <= 1.0 and 0.0 <= success <= 1.0 and 0.0 <= target <= 1.0):
        raise MethodError(
            f"probability = {probability}, success = {success}, target = {target}: not in [0, 1]"
        )
    return probability if target == 0.0 else probability * min(1.0, max(success / target, 0.125))
