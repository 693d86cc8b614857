"""Is a rollout a dead end, of which kind, and where is it cut?"""

from __future__ import annotations

from collections.abc import Collection

from rexrag.types import DeadEnd, Rollout


def dead_end_kinds(rollout: Rollout, right: bool) -> frozenset[DeadEnd]:
    """Every kind that applies; empty for a rollout that is right [METHOD §2].

    `right` is the verdict on its answer: exact match with the gold answer, or a judge's.
    """
    if right:
        return frozenset()
    if rollout.answer is None:
        return frozenset({DeadEnd.UNANSWERED})
    queries = [" ".join(turn.argument.lower().split()) for turn in rollout.turns if turn.action == "search"]
    kinds = {DeadEnd.WRONG}
    if not queries:
        kinds.add(DeadEnd.NO_EVIDENCE)
    if len(set(queries)) < len(queries):
        kinds.add(DeadEnd.REPEATED_SEARCH)
    return frozenset(kinds)


def cut_position(rollout: Rollout) -> int | None:
    """Token at which a probe cuts: the boundary at or before the tag of the last turn's action.

    For an answered rollout that is its `<answer>`. An unanswered one is cut before the action it spent its
    last turn on, or at the end of that turn's tokens if it took none. None where nothing was sampled.
    """
    if not rollout.turns:
        return None
    last = rollout.turns[-1]
    return last.end if last.action_start is None else last.action_start


def is_dead_end(
    rollout: Rollout, right: bool, wanted: Collection[DeadEnd], probe_forced_turn: bool = False
) -> bool:
    """Can this base rollout be probed?

    Answers of the forced last turn are left alone unless `probe_forced_turn` [METHOD §2.3]. A rollout that
    is itself a probe never is one.
    """
    if rollout.is_probe or cut_position(rollout) is None:
        return False
    if rollout.answer is not None and rollout.forced_last_turn and not probe_forced_turn:
        return False
    return not dead_end_kinds(rollout, right).isdisjoint(wanted)


def last_cut(rollout: Rollout, wanted: Collection[DeadEnd], probe_forced_turn: bool = False) -> int:
    """The latest token at which some probe of this o′ could have been cut; −1 where none could.

    Not behind the tag of its answer, since a probe is cut before one; and not in the forced last turn where
    no rollout that ends there is probed. What a rollout says by itself behind that is no explanation of it.
    """
    if not rollout.turns:
        return -1
    last = rollout.turns[-1]
    reachable = probe_forced_turn or DeadEnd.UNANSWERED in wanted
    if rollout.forced_last_turn and not reachable:
        return last.start - 1
    return len(rollout.tokens) if rollout.answer_start is None else rollout.answer_start
