"""Greedy evaluation with intervals: the same episode as in training, on questions nobody trained on."""

from __future__ import annotations

import time
from collections.abc import Sequence
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
    """EM and F1 with 95 % bootstrap intervals, EM by hops, searches, unanswered share, tokens written.

    `em_by_question` keeps the order of the questions, so that two evaluations can be compared in pairs.
    """
    em = [rollout.em for rollout in rollouts]
    by_hops = {
        str(hops): interval([r.em for r in rollouts if r.question.hops == hops])
        for hops in sorted({r.question.hops for r in rollouts} - {0})
    }
    return {
        "em": interval(em),
        "f1": interval([0.0 if r.answer is None else f1(r.answer, r.question.answers) for r in rollouts]),
        "by_hops": by_hops,
        "searches": _mean([sum(t.action == "search" for t in r.turns) for r in rollouts]),
        "unanswered": _mean([r.answer is None for r in rollouts]),
        "tokens": _mean([r.count(Origin.POLICY) for r in rollouts]),
        "em_by_question": em,
    }


def _mean(values: Sequence[float | int | bool]) -> float:
    return float(np.mean(values)) if len(values) else 0.0
