"""What is a dead end, of which kind, where it is cut, and which are probed."""

import pytest
import torch

from rexrag.errors import CueError, MethodError
from rexrag.method.dead_ends import cut_position, dead_end_kinds, is_dead_end, last_cut
from rexrag.method.probing import in_all_wrong_groups, plan_probes
from rexrag.types import DeadEnd, Question, Rollout, StopReason, Turn

QUESTION = Question("q", "Who?", ("x",))


def rollout(*turns, answer="y", **kw):
    stop = StopReason.ANSWER if answer is not None else StopReason.TURNS
    return Rollout(QUESTION, (1,), (2,) * 9, (0,) * 9, (0.0,) * 9, turns, stop, answer, 0.0, **kw)


def search(query, start=0):
    return Turn(start, start + 3, "search", query, action_start=start + 1)


ANSWER = Turn(6, 9, "answer", "y", action_start=7)


@pytest.mark.parametrize(
    ("made", "right", "kinds"),
    [
        (rollout(search("a"), ANSWER), True, set()),
        (rollout(search("a"), ANSWER), False, {DeadEnd.WRONG}),
        (rollout(ANSWER), False, {DeadEnd.WRONG, DeadEnd.NO_EVIDENCE}),
        (rollout(search("a b"), search(" A  b", 3), ANSWER), False, {DeadEnd.WRONG, DeadEnd.REPEATED_SEARCH}),
        (rollout(search("a"), search("b", 3), answer=None), False, {DeadEnd.UNANSWERED}),
    ],
)
def test_kinds(made, right, kinds):
    assert dead_end_kinds(made, right) == kinds
    assert is_dead_end(made, right, [DeadEnd.WRONG]) == (DeadEnd.WRONG in kinds)
    assert is_dead_end(made, right, list(DeadEnd)) == bool(kinds)


def test_forced_last_turn_and_probes_are_left_alone():
    forced = rollout(search("a"), ANSWER, forced_last_turn=True)
    assert not is_dead_end(forced, False, [DeadEnd.WRONG])
    assert is_dead_end(forced, False, [DeadEnd.WRONG], probe_forced_turn=True)
    assert not is_dead_end(rollout(ANSWER, cut=3, parent=0), False, [DeadEnd.WRONG])


def test_cut_is_the_boundary_before_the_last_action():
    assert cut_position(rollout(search("a"), ANSWER)) == 7
    assert cut_position(rollout(search("a", 3), answer=None)) == 4
    assert cut_position(rollout(Turn(3, 8), answer=None)) == 8
    assert cut_position(rollout(answer=None)) is None


def test_the_latest_cut_a_probe_can_have():
    only_wrong = [DeadEnd.WRONG]
    assert last_cut(rollout(search("a"), ANSWER), only_wrong) == 7
    assert last_cut(rollout(search("a"), answer=None), only_wrong) == 9
    assert last_cut(rollout(answer=None), only_wrong) == -1
    forced = rollout(search("a"), ANSWER, forced_last_turn=True)
    assert last_cut(forced, only_wrong) == 5
    assert last_cut(forced, only_wrong, probe_forced_turn=True) == 7
    unanswered = rollout(search("a"), Turn(6, 9), answer=None, forced_last_turn=True)
    assert last_cut(unanswered, only_wrong) == 5
    assert last_cut(unanswered, [DeadEnd.UNANSWERED]) == 9


def test_plans_follow_the_generator_and_the_probability():
    def plan(probability, dead_ends=range(2000), pool=10, seed=3):
        return plan_probes(list(dead_ends), probability, pool, torch.Generator().manual_seed(seed))

    assert plan(0.2) == plan(0.2) != plan(0.2, seed=4)
    assert plan(0.0) == [] and [p.parent for p in plan(1.0)] == list(range(2000))
    share = len(plan(0.2)) / 2000
    assert 0.2 - 4 * 0.009 < share < 0.2 + 4 * 0.009
    counts = torch.bincount(torch.tensor([p.cue for p in plan(1.0)]), minlength=10)
    assert int(counts.min()) > 140 and int(counts.max()) < 260
    # One coin each: raising p only adds probes.
    assert set(plan(0.1)) <= set(plan(0.3))
    assert all(p.cue is None for p in plan(1.0, pool=None))


def test_all_wrong_groups():
    assert in_all_wrong_groups([True, False, False, False], [0, 0, 1, 1]) == [False, False, True, True]


def test_bad_input_is_named():
    with pytest.raises(MethodError, match=r"probability = 1\.2"):
        plan_probes([0], 1.2, 3, torch.Generator())
    with pytest.raises(CueError, match="pool_size = 0"):
        plan_probes([0], 0.2, 0, torch.Generator())
