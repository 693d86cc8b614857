"""Reward and correctness of a finished rollout, and checks of what a plug-in returns for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from numbers import Integral
from typing import Any

from rexrag.agent.reward import exact_match, f1
from rexrag.config.schema import AgentConfig
from rexrag.errors import PluginError
from rexrag.plugins import calling, load_plugin, shown
from rexrag.types import Question, Rollout

Reward = Callable[[Rollout], float]
"""The reward of a rollout, from its turns, document ids, answer and gold answers."""
AnswerJudge = Callable[[str, Question], bool]
"""Is this answer to the question correct?"""


def answer_em(rollout: Rollout) -> float:
    """Reward `em`: 1.0 where the answer equals a gold answer after normalisation."""
    return rollout.em


def answer_f1(rollout: Rollout) -> float:
    """Reward `f1`: best token F1 against a gold answer, 0 without an answer."""
    return 0.0 if rollout.answer is None else f1(rollout.answer, rollout.question.answers)


def matches_exactly(answer: str, question: Question) -> bool:
    """Judge `em`: exact match with a gold answer after normalisation."""
    return exact_match(answer, question.answers) == 1.0


REWARDS: dict[str, Reward] = {"em": answer_em, "f1": answer_f1}
JUDGES: dict[str, AnswerJudge] = {"em": matches_exactly}


@dataclass(frozen=True, slots=True)
class Scoring:
    """The reward and the judge of answers of a run. names: their names in error messages."""

    reward: Reward = answer_em
    judge: AnswerJudge = matches_exactly
    names: tuple[str, str] = ("em", "em")

    @classmethod
    def of(cls, config: AgentConfig) -> Scoring:
        """What a configuration names. Raises PluginError."""
        return _named(config.reward, config.answer_judge)

    def scored(self, rollout: Rollout) -> Rollout:
        """The rollout with EM, correctness and reward. Raises PluginError for what a plug-in returns."""
        em, correct = 0.0, False
        if rollout.answer is not None:
            em = exact_match(rollout.answer, rollout.question.answers)
            correct = self.judged(rollout.answer, rollout.question)
        rollout = replace(rollout, em=em, correct=correct)
        return replace(rollout, reward=self._rewarded(rollout))

    def judged(self, answer: str, question: Question) -> bool:
        """Is the answer correct? Raises PluginError where the judge says neither yes nor no."""
        verdict = self.judge(answer, question)
        if not _is_verdict(verdict):
            raise PluginError(
                f"answer judge {self.names[1]}: returned {shown(verdict)}, expected True or False"
            )
        return bool(verdict)

    def _rewarded(self, rollout: Rollout) -> float:
        value = self.reward(rollout)
        try:
            number = math.nan if isinstance(value, str | bytes) else float(value)
        except Exception:  # a tensor of several numbers raises RuntimeError, a huge integer OverflowError
            number = math.nan
        if not math.isfinite(number):
            raise PluginError(f"reward {self.names[0]}: returned {shown(value)}, expected a finite number")
        return number


def _is_verdict(value: Any) -> bool:
    """True, False, 1 or 0, of Python or of numpy, which is not imported for it."""
    kind = type(value)
    numpy_bool = kind.__module__ == "numpy" and kind.__name__ in ("bool", "bool_")
    return numpy_bool or (isinstance(value, Integral) and value in (0, 1))


@cache
def _named(reward: str, judge: str) -> Scoring:
    own_reward, own_judge = REWARDS.get(reward), JUDGES.get(judge)
    if own_reward is None:
        found = load_plugin(reward, "agent.reward", parameters=1, known=REWARDS)
        own_reward = partial(calling, f"reward {reward}", found)
    if own_judge is None:
        found = load_plugin(judge, "agent.answer_judge", parameters=2, known=JUDGES)
        own_judge = partial(calling, f"answer judge {judge}", found)
    return Scoring(own_reward, own_judge, (reward, judge))
