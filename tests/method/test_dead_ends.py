"""What is a dead end, by its answer or by a judge, and where it is cut."""

import pytest

from rexrag.errors import MethodError
from rexrag.method.dead_ends import can_be_probed, cut_position, find_dead_ends, is_dead_end
from rexrag.types import DeadEnd, RolloutGroup, Turn
from tests.support import rollouts
from tests.support.rollouts import QUESTION, P

ANSWER = Turn(6, 9, "answer", "y", action_start=7)
BOTH = (DeadEnd.WRONG, DeadEnd.UNANSWERED)


def rollout(*turns, **changes):
    return rollouts.rollout([P] * 9, turns=turns, **changes)


def search(query, start=0):
    return Turn(start, start + 3, "search", query, action_start=start + 1)


RIGHT = rollout(search("a"), ANSWER, correct=True)
WRONG = rollout(search("a"), ANSWER)
SILENT = rollout(search("a"), search("b", 3), answer=None)
FORCED = rollout(search("a"), ANSWER, forced_last_turn=True)
EMPTY = rollout(answer=None)


@pytest.mark.parametrize(
    ("made", "kind"), [(RIGHT, None), (WRONG, DeadEnd.WRONG), (SILENT, DeadEnd.UNANSWERED)]
)
def test_a_dead_end_is_wrong_or_unanswered(made, kind):
    assert is_dead_end(made, [DeadEnd.WRONG]) == (kind is DeadEnd.WRONG)
    assert is_dead_end(made, [DeadEnd.UNANSWERED]) == (kind is DeadEnd.UNANSWERED)
    assert is_dead_end(made, BOTH) == (kind is not None)


def test_correct_is_the_judge_s_word_not_the_reward_s():
    assert not is_dead_end(rollout(ANSWER, correct=True, reward=0.0), BOTH)
    assert is_dead_end(rollout(ANSWER, correct=False, reward=1.0, em=1.0), BOTH)


def test_an_answer_in_the_forced_last_turn_is_left_alone():
    assert not can_be_probed(FORCED) and not is_dead_end(FORCED, BOTH)
    spent = rollout(search("a"), search("b", 3), answer=None, forced_last_turn=True)
    assert can_be_probed(spent) and is_dead_end(spent, BOTH)
    assert not can_be_probed(EMPTY)


def test_cut_is_the_boundary_before_the_last_action():
    assert cut_position(WRONG) == 7
    assert cut_position(rollout(search("a", 3), answer=None)) == 4
    assert cut_position(rollout(Turn(3, 8), answer=None)) == 8
    assert cut_position(EMPTY) is None


def groups(*members):
    return [RolloutGroup(QUESTION, made) for made in members]


def test_groups_with_a_correct_rollout_may_be_left_out():
    found = find_dead_ends(groups((RIGHT, WRONG, FORCED), (SILENT, WRONG)), BOTH)
    assert [id(r) for r in found] == [id(WRONG), id(SILENT), id(WRONG)]
    failed = find_dead_ends(groups((RIGHT, WRONG, FORCED), (SILENT, WRONG)), BOTH, "all-wrong")
    assert [id(r) for r in failed] == [id(SILENT), id(WRONG)]
    # A wrong answer that cannot be probed still leaves its group without a correct one.
    assert find_dead_ends(groups((FORCED, WRONG)), (DeadEnd.WRONG,), "all-wrong") == [WRONG]


def test_a_judge_replaces_the_answers_wherever_they_were_asked():
    made = groups((RIGHT, WRONG, FORCED), (SILENT, WRONG))
    # The correct one is taken for dead, and no other of its group lives.
    said = [0.9, 0.6, 0.8, 0.5, 0.51]
    found = find_dead_ends(made, (), "all", lambda rollouts: said)
    assert [id(r) for r in found] == [id(RIGHT), id(WRONG), id(WRONG)]
    failed = find_dead_ends(made, (), "all-wrong", lambda rollouts: said)
    assert [id(r) for r in failed] == [id(RIGHT), id(WRONG)]


def test_a_judge_sees_every_base_rollout_once_in_order():
    seen = []
    find_dead_ends(groups((RIGHT, WRONG), (SILENT,)), (), judge=lambda r: seen.append(r) or [0.0] * 3)
    assert seen == [[RIGHT, WRONG, SILENT]]


def test_a_judge_of_another_length_is_refused():
    with pytest.raises(MethodError, match="gave 2 values for 1 rollouts"):
        find_dead_ends(groups((WRONG,)), (), judge=lambda rollouts: [0.1, 0.2])
