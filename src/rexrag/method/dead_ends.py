"""Which rollouts are dead ends, and where they are cut."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from rexrag.errors import MethodError
from rexrag.types import DeadEnd, Rollout, RolloutGroup

Judge = Callable[[Sequence[Rollout]], Sequence[float]]
"""P(dead end) of each rollout, without its gold answers."""
DEAD = 0.5
"""A rollout is a dead end where the judge's probability is above this."""


def cut_position(rollout: Rollout) -> int | None:
    """Token at which a probe cuts: the boundary at or before the tag of the last turn's action.

    For an answered rollout that is its `<answer>`. An unanswered one is cut before the action it spent its
    last turn on, or at the end of that turn's tokens if it took none. None where nothing was sampled.
    """
    if not rollout.turns:
        return None
    last = rollout.turns[-1]
    return last.end if last.action_start is None else last.action_start


def can_be_probed(rollout: Rollout) -> bool:
    """Something was sampled, and no answer was given in the forced last turn [METHOD §2.3]."""
    answered_late = rollout.answer is not None and rollout.forced_last_turn
    return cut_position(rollout) is not None and not answered_late


def is_dead_end(rollout: Rollout, kinds: Collection[DeadEnd]) -> bool:
    """Can this base rollout be probed, and is it wrong in one of these ways [METHOD §2.2]?"""
    if rollout.correct or not can_be_probed(rollout):
        return False
    return (DeadEnd.UNANSWERED if rollout.answer is None else DeadEnd.WRONG) in kinds


def find_dead_ends(
    groups: Sequence[RolloutGroup],
    kinds: Collection[DeadEnd],
    probe_groups: str = "all",
    judge: Judge | None = None,
) -> list[Rollout]:
    """The dead ends among base rollouts, in order.

    kinds: what counts as one, where no judge is given. probe_groups: "all", or "all-wrong": only of groups
    without a correct rollout (with a judge: groups in which it calls every rollout a dead end).
    Raises MethodError (a judge of another length).
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    if judge is None:
        dead = [is_dead_end(rollout, kinds) for rollout in rollouts]
        failed = [not rollout.correct for rollout in rollouts]
    else:
        chances = judge(rollouts)
        if len(chances) != len(rollouts):
            raise MethodError(f"the judge gave {len(chances)} values for {len(rollouts)} rollouts")
        failed = [chance > DEAD for chance in chances]
        dead = [is_dead and can_be_probed(r) for r, is_dead in zip(rollouts, failed, strict=True)]
    found, place = [], 0
    for group in groups:
        here = range(place, place + len(group.rollouts))
        place += len(group.rollouts)
        if probe_groups == "all" or all(failed[i] for i in here):
            found += [rollouts[i] for i in here if dead[i]]
    return found
