"""A judge of dead ends never sees what it is to guess, and returns probabilities or is named."""

import numpy as np
import pytest
import torch

from rexrag.agent.dead_end_judge import BlindRollout, JudgeContext, blinded
from rexrag.errors import PluginError
from rexrag.method.dead_ends import find_dead_ends
from rexrag.types import RolloutGroup
from tests.support import plugins
from tests.support.rollouts import QUESTION, P, rollout

NAME = "tests.support.plugins:judge"
MADE = rollout([P] * 4, correct=True, em=1.0, reward=1.0, text="so y")


def asked(judge, rollouts=(MADE, MADE)):
    return blinded(judge, JudgeContext(), NAME)(rollouts)


@pytest.mark.parametrize("secret", ["answers", "reward", "em", "correct"])
def test_gold_answers_reward_and_verdict_are_out_of_reach(secret):
    def peeks(rollouts, context):
        return [getattr(rollout, secret) for rollout in rollouts]

    def peeks_at_the_question(rollouts, context):
        return [getattr(rollout.question, secret) for rollout in rollouts]

    for judge in (peeks, peeks_at_the_question):
        with pytest.raises(PluginError, match=f"{NAME}: AttributeError: .*{secret}"):
            asked(judge)


def test_nothing_that_is_blind_holds_a_rollout_or_a_question():
    blind = BlindRollout.of(MADE)
    values = [getattr(blind, name) for name in BlindRollout.__dataclass_fields__]
    assert not any(value is MADE or value is QUESTION for value in values)
    assert not any(QUESTION.answers == value for value in values)


def test_everything_else_is_as_in_the_rollout():
    blind = BlindRollout.of(MADE)
    assert (blind.question, blind.question_id) == ("Who?", "q")
    for name in ("prompt", "tokens", "origins", "logps", "turns", "stop", "answer", "text"):
        assert getattr(blind, name) == getattr(MADE, name)


def test_a_judge_finds_dead_ends_of_its_own():
    right, wrong = rollout([P] * 4, answer="x"), rollout([P] * 4, answer="y", correct=True)
    groups = [RolloutGroup(QUESTION, (right, wrong))]
    judge = blinded(plugins.wrong_answers, JudgeContext(), NAME)
    assert [id(r) for r in find_dead_ends(groups, (), "all", judge)] == [id(wrong)]


def test_a_judge_is_given_what_the_engine_can_do():
    context = JudgeContext(score=lambda rows, temperature: [[-1.0]] * len(rows))

    def judge(rollouts, given):
        assert given is context and given.ask is None
        scores = given.score([(r.prompt, r.tokens) for r in rollouts], 1.0)
        return [-score[0] for score in scores]

    assert blinded(judge, context, NAME)([MADE]) == [1.0]


@pytest.mark.parametrize(
    ("judge", "says"),
    [
        (plugins.too_few, "returned 1 values for 2 rollouts"),
        (plugins.above_one, "returned 1.5, expected a probability in [0, 1]"),
        (plugins.nan_chance, "returned nan, expected a probability in [0, 1]"),
        (plugins.no_list, "returned 0.5, expected probabilities"),
        (plugins.words, "returned ['dead', 'dead'], expected probabilities"),
        (plugins.nothing, "returned None, expected probabilities"),
        (plugins.several, "returned tensor([[1., 2.], [3., 4.]]), expected probabilities"),
        (plugins.fails, "KeyError: 'gold'"),
        (lambda rollouts, context: {0.0, 1.0}, "returned a set, expected a list of probabilities"),
        (lambda rollouts, context: "01", "returned a str, expected a list of probabilities"),
        (lambda rollouts, context: {0.0: 1, 1.0: 2}, "returned a dict, expected a list of probabilities"),
        (
            lambda rollouts, context: iter([0, 1]),
            "returned a list_iterator, expected a list of probabilities",
        ),
    ],
)
def test_what_is_no_probability_is_one_line(judge, says):
    with pytest.raises(PluginError) as caught:
        asked(judge)
    assert str(caught.value) == f"dead-end judge {NAME}: {says}"


@pytest.mark.parametrize("made", [list, tuple, np.array, torch.tensor])
def test_every_kind_of_sequence_will_do(made):
    assert asked(lambda rollouts, context: made([0.0, 0.5])) == [0.0, 0.5]
