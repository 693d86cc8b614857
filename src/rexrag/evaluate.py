"""Greedy evaluation with intervals: the same episode as in training, on questions nobody trained on."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rexrag.agent.episode import Episode
from rexrag.agent.reward import f1
from rexrag.config import Config
from rexrag.engine.base import Policy
from rexrag.intervals import interval
from rexrag.retrieval.base import Retriever
from rexrag.types import Origin, Question, Rollout


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Finished rollouts of an evaluation and its figures, ready for `eval.jsonl`."""

    rollouts: list[Rollout]
    figures: dict[str, Any]


def evaluate(
    policy: Policy,
    questions: Sequence[Question],
    retriever: Retriever,
    config: Config,
    seed: int = 0,
    temperature: float = 0.0,
) -> Evaluation:
    """Roll out every question once (temperature 0: greedy) and score it."""
    start = time.perf_counter()
    session = policy.session()
    try:
        episodes = [Episode(q, policy.codec, config.agent, config.retriever.topk) for q in questions]
        session.run(episodes, retriever, temperature, seed)
        rollouts = [episode.rollout() for episode in episodes]
    finally:
        session.close()
    return Evaluation(rollouts, {**figures(rollouts), "seconds": time.perf_counter() - start})


def figures(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """The figures of finished rollouts, in the order of their questions. See `figures_of`."""
    return figures_of([score_of(rollout) for rollout in rollouts])


def score_of(rollout: Rollout) -> dict[str, float]:
    """What an evaluation keeps of one rollout."""
    answer, question = rollout.answer, rollout.question
    return {
        "em": rollout.em,
        "f1": 0.0 if answer is None else f1(answer, question.answers),
        "searches": float(sum(turn.action == "search" for turn in rollout.turns)),
        "unanswered": float(answer is None),
        "tokens": float(rollout.count(Origin.POLICY)),
        "hops": float(question.hops),
    }


def figures_of(scores: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """EM and F1 with 95 % bootstrap intervals, EM by hops, searches, unanswered share, tokens written.

    `em_by_question` keeps the order, so that two evaluations can be compared in pairs.
    """
    em = [score["em"] for score in scores]
    by_hops = {
        str(hops): interval([score["em"] for score in scores if score["hops"] == hops])
        for hops in sorted({int(score["hops"]) for score in scores} - {0})
    }
    means = {name: _mean([score[name] for score in scores]) for name in ("searches", "unanswered", "tokens")}
    return {
        "em": interval(em),
        "f1": interval([score["f1"] for score in scores]),
        "by_hops": by_hops,
        **means,
        "em_by_question": em,
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0
