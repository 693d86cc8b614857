"""Diagnosis of a checkpoint before it is trained: how it fails, and how often a probe recovers its dead ends.

A checkpoint that leaves its dead ends by sampling alone needs no probes; one that never leaves them gives
plain GRPO no signal. Every question is answered once greedily and a few times at the training temperature;
each dead end is then continued twice, with a cue of the pool and without one. Nothing is trained.

Unless a caller says which questions are hard, those are that the policy answers wrongly when it is greedy.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy import stats

from rexrag.agent.episode import Episode, State
from rexrag.agent.prompts import cue_pool
from rexrag.config.algorithms import Probing
from rexrag.config.schema import Config
from rexrag.engine.base import Policy, Session
from rexrag.engine.loading import load_policy
from rexrag.method.dead_ends import is_dead_end
from rexrag.retrieval import make_retriever
from rexrag.retrieval.base import Retriever
from rexrag.stats import share
from rexrag.training.components import check_window, load_data
from rexrag.types import DeadEnd, Probe, Question, Rollout

WITHOUT_CUE, WITH_CUE = "without a cue", "with a cue of the pool"
STILL_RIGHT = "right answers that stay right after a cue"
Figure = dict[str, float]
Finished = tuple[Episode, Rollout]
"""An episode that is over, and what it wrote."""


@dataclass(slots=True)
class Observed:
    """Rollouts of one or several sets of questions."""

    greedy: list[Rollout] = field(default_factory=list)
    sampled: list[Rollout] = field(default_factory=list)
    probes: dict[str, list[Probe]] = field(default_factory=dict)
    """Continuations of dead ends, by the name of the cues they were given."""
    after_right: list[Probe] = field(default_factory=list)
    """Continuations of right rollouts, with a cue."""

    def add(self, other: Observed) -> None:
        self.greedy += other.greedy
        self.sampled += other.sampled
        for name, probes in other.probes.items():
            self.probes.setdefault(name, []).extend(probes)
        self.after_right += other.after_right


def examine(config: Config, questions: int = 150) -> dict[str, Figure]:
    """`describe` what the configured policy does with some of its training questions. Raises RexragError."""
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    data = load_data(config.data)
    retriever = make_retriever(config.retriever, data.corpus)
    asked = random.Random(config.seed).sample(data.train, min(questions, len(data.train)))
    policy = load_policy(config.policy)
    check_window(policy, config)
    return describe(observe(policy, retriever, asked, config, seed=config.seed), policy)


def observe(
    policy: Policy,
    retriever: Retriever,
    questions: Sequence[Question],
    config: Config,
    *,
    rollouts: int = 2,
    seed: int = 0,
    cues: Mapping[str, Sequence[str]] | None = None,
) -> Observed:
    """Answer every question greedily and `rollouts` times at the training temperature, then probe.

    cues: name -> texts to draw from; an empty list continues without a cue. Default: no cue, and the
    configured pool (where there is one).
    """
    pool = list(cue_pool(config.agent.cues)) if config.agent.cues != "none" else []
    variants = cues if cues is not None else {WITHOUT_CUE: [], **({WITH_CUE: pool} if pool else {})}
    session = policy.session()
    try:
        sampling = _Sampling(policy, session, retriever, config, seed)
        seen = Observed(greedy=[rollout for _, rollout in sampling.answer(questions, 0.0, seed)])
        repeated = [question for question in questions for _ in range(rollouts)]
        finished = sampling.answer(repeated, config.agent.temperature, seed + 1)
        seen.sampled = [rollout for _, rollout in finished]
        dead = [pair for pair in finished if is_dead_end(pair[1], _kinds(config))]
        for number, (name, texts) in enumerate(variants.items()):
            seen.probes[name] = sampling.probe(dead, texts, number)
        if pool:
            right = [pair for pair in finished if pair[1].correct and pair[1].turns]
            seen.after_right = sampling.probe(right, pool, len(variants))
    finally:
        session.close()
    return seen


def _kinds(config: Config) -> tuple[DeadEnd, ...]:
    """Which rollouts the configured algorithm calls dead ends; wrong ones where it does not say."""
    algorithm = config.algorithm
    if isinstance(algorithm, Probing) and algorithm.dead_ends != "judge":
        return algorithm.dead_ends
    return (DeadEnd.WRONG,)


@dataclass(frozen=True, slots=True)
class _Sampling:
    """A session, and what every episode in it shares."""

    policy: Policy
    session: Session
    retriever: Retriever
    config: Config
    seed: int

    def answer(self, questions: Sequence[Question], temperature: float, seed: int) -> list[Finished]:
        agent, topk = self.config.agent, self.config.retriever.topk
        episodes = [Episode(question, self.policy.codec, agent, topk) for question in questions]
        self.session.run(episodes, self.retriever, temperature, seed)
        return [(episode, episode.rollout()) for episode in episodes]

    def probe(self, parents: Sequence[Finished], texts: Sequence[str], number: int) -> list[Probe]:
        """Each parent continued from its cut, with one of `texts`. number: of this set of probes."""
        rng = random.Random(f"prospects/{self.seed}/{number}")
        chosen = [rng.randrange(len(texts)) if texts else None for _ in parents]
        forks = [
            (rollout, episode.fork(() if cue is None else self.policy.codec.encode(texts[cue]), cue))
            for (episode, rollout), cue in zip(parents, chosen, strict=True)
        ]
        # As in a step: a cue that does not fit the window is no probe.
        forks = [(rollout, fork) for rollout, fork in forks if fork.state is not State.DONE]
        seed = self.seed + 2 + number
        self.session.run([fork for _, fork in forks], self.retriever, self.config.agent.temperature, seed)
        return [fork.probe(rollout) for rollout, fork in forks]


def describe(
    seen: Observed, policy: Policy, is_hard: Callable[[Question], bool] | None = None
) -> dict[str, Figure]:
    """Figures by name, shares as {value, low, high, n} with Wilson's interval.

    is_hard: which questions are hard; default: those that were answered wrongly when greedy.
    """
    wrong = {rollout.question.group for rollout in seen.greedy if not rollout.correct}
    hard = is_hard or (lambda question: question.group in wrong)
    tough = [rollout for rollout in seen.sampled if hard(rollout.question)]
    dead = [rollout for rollout in seen.sampled if rollout.answer is not None and not rollout.correct]
    figures = {
        "greedy EM": _share([r.correct for r in seen.greedy]),
        "hard questions: right by chance": _share([r.correct for r in tough]),
        "other questions: right": _share([r.correct for r in seen.sampled if not hard(r.question)]),
        "dead ends": share(len(dead), len(seen.sampled)),
        "no answer": _share([r.answer is None for r in seen.sampled]),
        "second thoughts without a cue": _share([second_thought(r, policy) for r in seen.sampled]),
    }
    for name, pairs in seen.probes.items():
        figures[f"dead ends recovered: {name}"] = _share([probe.rollout.correct for probe in pairs])
    if seen.after_right:
        figures[STILL_RIGHT] = _share([probe.rollout.correct for probe in seen.after_right])
    cued = [probe for probe in seen.probes.get(WITH_CUE, []) if probe.cue_length]
    if cued:
        figures["p(the cue's first token) at a dead end"] = {
            "value": sum(math.exp(probe.rollout.logps[probe.cut]) for probe in cued) / len(cued),
            "n": len(cued),
        }
    auc = cue_auc(cued)
    return figures | ({"AUC of mean cue log-prob for success": auc} if auc else {})


def second_thought(rollout: Rollout, policy: Policy) -> bool:
    """Did the policy, without a cue, open a second thought in one of its turns?"""
    return any(
        policy.codec.decode(rollout.tokens[turn.start : turn.end]).count("<think>") > 1
        for turn in rollout.turns
    )


def cue_auc(probes: Sequence[Probe]) -> Figure | None:
    """Area under the ROC curve of the filter's score (mean cue log-prob) for a right answer; .5 is chance.

    {value, p, n}; p of the two-sided Mann–Whitney test against chance. None where all are right or all wrong.
    """
    scores: dict[bool, list[float]] = {True: [], False: []}
    for probe in probes:
        cue = probe.rollout.logps[probe.cut : probe.cut + probe.cue_length]
        scores[probe.rollout.correct].append(sum(cue) / probe.cue_length)
    good, bad = scores[True], scores[False]
    if not good or not bad:
        return None
    test = stats.mannwhitneyu(good, bad, alternative="two-sided")
    return {
        "value": float(test.statistic) / (len(good) * len(bad)),
        "p": float(test.pvalue),
        "n": len(probes),
    }


def lines(figures: Mapping[str, Figure]) -> list[tuple[str, str, Any]]:
    """Rows (what, value with its interval, n) of a table; shares in percent."""

    def value(figure: Figure) -> str:
        if "low" in figure:
            low, high = 100 * figure["low"], 100 * figure["high"]
            return f"{100 * figure['value']:.1f} % [{low:.1f}, {high:.1f}]"
        return f"{figure['value']:.4f}" + (f" (p = {figure['p']:.2g})" if "p" in figure else "")

    return [(name, value(figure), figure["n"]) for name, figure in figures.items()]


def _share(happened: Sequence[bool]) -> Figure:
    return share(sum(happened), len(happened))
