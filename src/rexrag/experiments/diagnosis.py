"""What decides a comparison before it starts: how a policy fails, and what it makes of a probe.

A start that escapes its dead ends by chance needs no probes; one that never does gives plain GRPO nothing
to learn from. Every question is answered once greedily and a few times at the training temperature; each
dead end is then continued twice, with a cue of the pool and without one. Nothing is trained.

Where a world does not say which questions are hard, those are hard that the policy answers wrongly when it
is greedy.
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
from rexrag.engine.base import Policy
from rexrag.engine.loading import load_policy
from rexrag.method.dead_ends import is_dead_end
from rexrag.retrieval import make_retriever
from rexrag.retrieval.base import Retriever
from rexrag.stats import share
from rexrag.training.components import check_window, load_data
from rexrag.types import DeadEnd, Probe, Question, Rollout

RESAMPLE, CUE, NEITHER = "resample, no cue", "a cue of the pool", "right answers that survive a cue"
Figure = dict[str, float]


@dataclass(slots=True)
class Observed:
    """Rollouts of one or several sets of questions; `probes[name]` are continuations under that name."""

    greedy: list[Rollout] = field(default_factory=list)
    sampled: list[Rollout] = field(default_factory=list)
    probes: dict[str, list[Probe]] = field(default_factory=dict)
    survivors: list[Probe] = field(default_factory=list)
    """Right rollouts that were given a cue all the same."""


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
    into: Observed | None = None,
) -> Observed:
    """Answer, sample and probe. `cues`: name → texts to draw from; an empty list goes on without a cue.

    Default: no cue, and the configured pool (where it has one).
    """
    seen = into or Observed()
    pool = list(cue_pool(config.agent.cues)) if config.agent.cues != "none" else []
    variants = cues if cues is not None else {RESAMPLE: [], **({CUE: pool} if pool else {})}
    agent, topk, algorithm = config.agent, config.retriever.topk, config.algorithm
    kinds: tuple[DeadEnd, ...] = (DeadEnd.WRONG,)
    if isinstance(algorithm, Probing) and algorithm.dead_ends != "judge":
        kinds = algorithm.dead_ends

    def fresh(asked: Sequence[Question]) -> list[Episode]:
        return [Episode(question, policy.codec, agent, topk) for question in asked]

    session = policy.session()
    try:
        episodes = fresh(questions)
        session.run(episodes, retriever, 0.0, seed)
        seen.greedy += [episode.rollout() for episode in episodes]
        sampled = fresh([question for question in questions for _ in range(rollouts)])
        session.run(sampled, retriever, agent.temperature, seed + 1)
        drawn = [episode.rollout() for episode in sampled]
        seen.sampled += drawn
        both = list(zip(sampled, drawn, strict=True))
        dead = [(episode, rollout) for episode, rollout in both if is_dead_end(rollout, kinds)]
        right = [(episode, rollout) for episode, rollout in both if rollout.correct and rollout.turns]

        def go_on(parents: Sequence[tuple[Episode, Rollout]], texts: Sequence[str], salt: int) -> list[Probe]:
            rng = random.Random(f"prospects/{seed}/{salt}")
            chosen = [rng.randrange(len(texts)) if texts else None for _ in parents]
            forks = [
                (rollout, episode.fork(() if cue is None else policy.codec.encode(texts[cue]), cue))
                for (episode, rollout), cue in zip(parents, chosen, strict=True)
            ]
            # As in a step: a cue that does not fit the window is no probe.
            forks = [(rollout, fork) for rollout, fork in forks if fork.state is not State.DONE]
            session.run([fork for _, fork in forks], retriever, agent.temperature, seed + 2 + salt)
            return [fork.probe(rollout) for rollout, fork in forks]

        for salt, (name, texts) in enumerate(variants.items()):
            seen.probes.setdefault(name, []).extend(go_on(dead, texts, salt))
        if pool:
            seen.survivors += go_on(right, pool, len(variants))
    finally:
        session.close()
    return seen


def describe(
    seen: Observed, policy: Policy, is_hard: Callable[[Question], bool] | None = None
) -> dict[str, Figure]:
    """Shares {value, low, high, n} by name, in the order in which a reader needs them."""
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
        "doubts by itself": _share([second_thought(r, policy) for r in seen.sampled]),
    }
    for name, pairs in seen.probes.items():
        figures[f"dead ends recovered: {name}"] = _share([probe.rollout.correct for probe in pairs])
    if seen.survivors:
        figures[NEITHER] = _share([probe.rollout.correct for probe in seen.survivors])
    cued = [probe for probe in seen.probes.get(CUE, []) if probe.cue_length]
    if cued:
        figures["p(the cue's first token) at a dead end"] = {
            "value": sum(math.exp(probe.rollout.logps[probe.cut]) for probe in cued) / len(cued),
            "n": len(cued),
        }
    auc = cue_auc(cued)
    return figures | ({"AUC of mean cue log-prob for success": auc} if auc else {})


def second_thought(rollout: Rollout, policy: Policy) -> bool:
    """Did the policy open a second thought within a turn by itself, before it acted?"""
    return any(
        policy.codec.decode(rollout.tokens[turn.start : turn.end]).count("<think>") > 1
        for turn in rollout.turns
    )


def cue_auc(probes: Sequence[Probe]) -> Figure | None:
    """How well the filter's score tells probes that succeed from those that fail: .5 is blind.

    {value, p, n}; p is the two-sided Mann–Whitney test of "blind". None where all succeed or all fail.
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
    """Rows (what, value with its interval, n) of a table."""

    def value(figure: Figure) -> str:
        text = f"{figure['value']:.4f}"
        if "low" in figure:
            return f"{text} [{figure['low']:.4f}, {figure['high']:.4f}]"
        return f"{text} (p = {figure['p']:.2g})" if "p" in figure else text

    return [(name, value(figure), figure["n"]) for name, figure in figures.items()]


def _share(happened: Sequence[bool]) -> Figure:
    return share(sum(happened), len(happened))
