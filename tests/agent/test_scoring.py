"""Reward and verdict of a rollout: built in, by dotted name, as arguments; what they may not return."""

from dataclasses import replace

import numpy as np
import pytest

from rexrag.agent.scoring import Scoring, answer_em, matches_exactly
from rexrag.config.schema import AgentConfig
from rexrag.errors import PluginError
from rexrag.plugins import give
from rexrag.types import Question
from tests.support import plugins
from tests.support.rollouts import P, rollout

HERE = "tests.support.plugins"
QUESTION = Question("q", "Who?", ("Madison",))


def scored(answer, reward=None, judge=None, /, **settings):
    made = replace(rollout([P] * 3, answer=answer), question=QUESTION)
    given = {"reward": reward and give(reward), "answer_judge": judge and give(judge)}
    named = {key: name for key, name in given.items() if name}
    return Scoring.of(AgentConfig(**settings | named)).scored(made)


@pytest.mark.parametrize(
    ("answer", "settings", "reward", "correct"),
    [
        ("madison", {}, 1.0, True),
        ("president madison", {}, 0.0, False),
        ("president madison", {"reward": "f1"}, 2 / 3, False),
        ("The Madison!", {"reward": "f1"}, 1.0, True),
        (None, {}, 0.0, False),
        (None, {"reward": "f1"}, 0.0, False),
        ("madison", {"reward": f"{HERE}:long_answer"}, 7.0, True),
        ("Mad", {"answer_judge": f"{HERE}:begins_alike"}, 0.0, True),
    ],
)
def test_reward_and_verdict(answer, settings, reward, correct):
    made = scored(answer, **settings)
    assert (made.reward, made.correct) == (pytest.approx(reward), correct)
    assert made.em == float(answer in ("madison", "The Madison!"))


def test_no_judge_is_asked_where_there_is_no_answer():
    def judge(answer, question):
        raise AssertionError

    assert not scored(None, None, judge).correct


def test_a_reward_sees_the_verdict():
    made = scored("Mad", lambda r: 2.0 + r.correct + r.em, lambda answer, question: True)
    assert (made.reward, made.correct, made.em) == (3.0, True, 0.0)


@pytest.mark.parametrize(
    ("reward", "returned"),
    [
        ("not_a_number", "nan"),
        ("endless", "inf"),
        ("no_number", "'much'"),
        ("nothing", "None"),
        ("several", "tensor([[1., 2.], [3., 4.]])"),
        ("huge", "1" + "0" * 76 + "..."),
    ],
)
def test_a_reward_is_a_finite_number_or_one_line(reward, returned):
    with pytest.raises(PluginError) as caught:
        scored("madison", reward=f"{HERE}:{reward}")
    assert str(caught.value) == f"reward {HERE}:{reward}: returned {returned}, expected a finite number"


@pytest.mark.parametrize(
    ("judge", "returned"),
    [
        ("maybe", "'maybe'"),
        ("nothing", "None"),
        ("several", "tensor([[1., 2.], [3., 4.]])"),
        ("seven", "7"),
        ("minus_one", "-1"),
        ("one_point_zero", "1.0"),
    ],
)
def test_a_verdict_is_true_or_false_or_one_line(judge, returned):
    with pytest.raises(PluginError) as caught:
        scored("madison", answer_judge=f"{HERE}:{judge}")
    assert str(caught.value) == f"answer judge {HERE}:{judge}: returned {returned}, expected True or False"


@pytest.mark.parametrize("verdict", [True, 1, np.bool_(True), np.int64(1), False, 0, np.bool_(False)])
def test_a_verdict_may_be_a_number_or_numpy_s(verdict):
    assert scored("x", None, lambda answer, question: verdict).correct is bool(verdict)


@pytest.mark.parametrize(
    ("key", "what", "given"),
    [
        ("reward", "reward", (plugins.fails,)),
        ("answer_judge", "answer judge", (None, plugins.fails)),
    ],
)
def test_a_reward_or_judge_that_fails_is_one_line(key, what, given):
    with pytest.raises(PluginError) as caught:
        scored("madison", **{key: f"{HERE}:fails"})
    assert str(caught.value) == f"{what} {HERE}:fails: KeyError: 'gold'"
    with pytest.raises(PluginError, match=f"^{what} {HERE}:fails: KeyError: 'gold'$"):
        scored("madison", *given)


def test_what_is_built_in_is_called_directly():
    assert Scoring.of(AgentConfig()).reward is answer_em
    assert Scoring.of(AgentConfig()).judge is matches_exactly


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"reward": f"{HERE}:needs_two"}, "takes (rollout, question), expected 1 positional"),
        ({"reward": "fi1"}, "did you mean 'f1'?"),
        ({"answer_judge": f"{HERE}:needs_three"}, "takes (answer, question, context), expected 2"),
        ({"answer_judge": "exact"}, "expected em, module:name"),
        ({"answer_judge": f"{HERE}:exact_"}, f"{HERE} has no 'exact_'"),
    ],
)
def test_a_name_that_cannot_be_used_is_one_line(settings, says):
    with pytest.raises(PluginError) as caught:
        scored("madison", **settings)
    (key, name), *_ = settings.items()
    assert str(caught.value).startswith(f"agent.{key} = '{name}': {says}")
    assert "\n" not in str(caught.value)


def test_an_argument_is_called_by_its_dotted_name():
    with pytest.raises(PluginError, match=r"reward .*:not_a_number: returned nan"):
        scored("madison", plugins.not_a_number)
    with pytest.raises(PluginError, match=r"answer judge .*:maybe: returned 'maybe'"):
        scored("madison", None, plugins.maybe)
