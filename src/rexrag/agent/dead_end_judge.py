"""The dead-end judge, which never sees the gold answer: what it is given, and what it must return."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rexrag.errors import PluginError
from rexrag.plugins import calling, shown
from rexrag.types import Rollout, StopReason, Turn


@dataclass(frozen=True, slots=True)
class BlindRollout:
    """A rollout without gold answers, reward, EM and correctness; fields as in `Rollout`."""

    question: str
    question_id: str
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    origins: tuple[int, ...]
    logps: tuple[float, ...]
    turns: tuple[Turn, ...]
    stop: StopReason
    answer: str | None
    text: str
    forced_last_turn: bool

    @classmethod
    def of(cls, rollout: Rollout) -> BlindRollout:
        same = {n: getattr(rollout, n) for n in cls.__dataclass_fields__ if not n.startswith("question")}
        return cls(rollout.question.text, rollout.question.id, **same)


@dataclass(frozen=True, slots=True)
class JudgeContext:
    """Functions of the engine that a judge may call; None where there is none.

    score: (rows of (prompt ids, response ids), temperature) -> log-probs of each row's response tokens.
    """

    score: Callable[[Sequence[tuple[Sequence[int], Sequence[int]]], float], list[Any]] | None = None
    ask: Callable[..., Any] | None = None
    hidden: Callable[..., Any] | None = None


DeadEndJudge = Callable[[Sequence[BlindRollout], JudgeContext], Sequence[float]]
"""P(dead end) of each rollout, in [0, 1]."""


def blinded(
    judge: DeadEndJudge, context: JudgeContext, name: str
) -> Callable[[Sequence[Rollout]], Sequence[float]]:
    """The judge as the method calls it. Raises PluginError where it fails or returns no probabilities."""

    def judged(rollouts: Sequence[Rollout]) -> list[float]:
        blind = [BlindRollout.of(rollout) for rollout in rollouts]
        said = calling(f"dead-end judge {name}", judge, blind, context)
        if hasattr(said, "__iter__") and not _is_sequence(said):
            kind = type(said).__name__
            raise PluginError(f"dead-end judge {name}: returned a {kind}, expected a list of probabilities")
        try:
            chances = [float(chance) for chance in said]
        except Exception:  # a tensor of two dimensions raises RuntimeError
            message = f"dead-end judge {name}: returned {shown(said)}, expected probabilities"
            raise PluginError(message) from None
        if len(chances) != len(rollouts):
            raise PluginError(
                f"dead-end judge {name}: returned {len(chances)} values for {len(rollouts)} rollouts"
            )
        bad = [chance for chance in chances if math.isnan(chance) or not 0.0 <= chance <= 1.0]
        if bad:
            raise PluginError(f"dead-end judge {name}: returned {bad[0]}, expected a probability in [0, 1]")
        return chances

    return judged


def _is_sequence(value: Any) -> bool:
    """A list, a tuple, or an array of numpy or torch: its values are in the order of the rollouts."""
    is_text = isinstance(value, str | bytes | bytearray)
    return not is_text and (isinstance(value, Sequence) or hasattr(value, "__array__"))
