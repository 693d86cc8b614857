"""Greedy evaluation with intervals: the same episode as in training, on questions nobody trained on.

Scoring and figures are here once, for evaluations during training and for `rexrag eval` (`evaluation/`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rexrag.agent.episode import Episode
from rexrag.agent.reward import score_answer
from rexrag.agent.scoring import Scoring, matches_exactly
from rexrag.config.schema import Config
from rexrag.engine.base import Policy
from rexrag.retrieval.base import Retriever
from rexrag.stats import score_interval
from rexrag.types import Origin, Question, Rollout, Turn, searches_run


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Finished rollouts of an evaluation and its figures, ready for `eval.jsonl`."""

    rollouts: list[Rollout]
    figures: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Scored:
    """One answered (or unanswered) question: scores as fractions in [0, 1], and what it took."""

    question: Question
    answer: str | None
    em: float
    f1: float
    sub_em: float
    searches: int
    """Searches that were run."""
    tokens: int
    """Tokens the policy wrote."""
    invalid: int
    """Turns without a valid action."""
    correct: bool
    """The verdict of the judge of answers."""


def evaluate(
    policy: Policy,
    questions: Sequence[Question],
    retriever: Retriever,
    config: Config,
    scoring: Scoring | None = None,
    seed: int = 0,
    temperature: float = 0.0,
) -> Evaluation:
    """Roll out every question once (temperature 0: greedy) and score it. scoring: as in training."""
    start = time.perf_counter()
    session = policy.session()
    try:
        episodes = [
            Episode(q, policy.codec, config.agent, config.retriever.topk, scoring=scoring) for q in questions
        ]
        session.run(episodes, retriever, temperature, seed)
        rollouts = [episode.rollout() for episode in episodes]
    finally:
        session.close()
    rows = [scored_rollout(rollout) for rollout in rollouts]
    return Evaluation(rollouts, {**figures(rows), "eval_seconds": time.perf_counter() - start})


def scored_rollout(rollout: Rollout) -> Scored:
    """The scores of a finished rollout."""
    searches = searches_run(rollout.turns, rollout.forced_last_turn)
    written = rollout.count(Origin.POLICY)
    row = scored(rollout.question, rollout.answer, searches, written, invalid_turns(rollout.turns))
    return replace(row, correct=rollout.correct)


def scored(question: Question, answer: str | None, searches: int, tokens: int, invalid: int) -> Scored:
    """An answer's EM, F1 and sub-EM beside what it took."""
    score = score_answer(answer, question.answers)
    correct = answer is not None and matches_exactly(answer, question)
    return Scored(question, answer, score.em, score.f1, score.sub_em, searches, tokens, invalid, correct)


def invalid_turns(turns: Sequence[Turn]) -> int:
    return sum(turn.action is None for turn in turns)


def numbers(row: Scored) -> dict[str, float]:
    """What figures are made of, as numbers by name: what another engine can carry beside a rollout."""
    return {
        "em": row.em,
        "correct": float(row.correct),
        "f1": row.f1,
        "sub_em": row.sub_em,
        "searches": float(row.searches),
        "unanswered": float(row.answer is None),
        "tokens": float(row.tokens),
        "invalid": float(row.invalid),
        "hops": float(row.question.hops),
    }


def figures(rows: Sequence[Scored]) -> dict[str, Any]:
    """The figures of scored questions. See `figures_of`."""
    return figures_of([numbers(row) for row in rows])


def figures_of(scores: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """EM, F1, sub-EM with 95 % bootstrap intervals, EM by hops; means of searches, tokens, invalid turns.

    scores: rows as `numbers` makes them. `em_by_question` keeps their order, so that two evaluations can be
    compared in pairs.
    """
    em = [score["em"] for score in scores]
    by_hops = {
        str(hops): score_interval([score["em"] for score in scores if score["hops"] == hops])
        for hops in sorted({int(score["hops"]) for score in scores} - {0})
    }
    means = ("searches", "unanswered", "tokens", "invalid")
    return {
        "em": score_interval(em),
        "correct": score_interval([score["correct"] for score in scores]),
        "f1": score_interval([score["f1"] for score in scores]),
        "sub_em": score_interval([score["sub_em"] for score in scores]),
        "by_hops": by_hops,
        **{name: mean([score[name] for score in scores]) for name in means},
        "em_by_question": em,
    }


def mean(values: Sequence[float | int | bool]) -> float:
    return float(np.mean(values)) if len(values) else 0.0
