"""One step of REX-RAG, in the order of the paper (arXiv 2508.08149) and of docs/method.md.

    questions → base rollouts → dead ends → probes → filter → rows → correction → advantages → samples

`collect` draws the rollouts and returns the samples that `Learner.update` trains on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rexrag.agent.episode import Episode, State
from rexrag.agent.scoring import Scoring
from rexrag.config.schema import Config
from rexrag.engine.base import Policy, Session
from rexrag.method.advantages import group_advantages
from rexrag.method.corrections import correction_of
from rexrag.method.cues import CueTrie
from rexrag.method.dead_ends import Judge
from rexrag.method.filters import filter_probes, groups_with_signal
from rexrag.method.probing import ProbePlan, plan, with_probes
from rexrag.method.rows import (
    Row,
    importance_ess,
    make_samples,
    pad,
    sampler_weight,
    with_logp,
    with_suffix_logp,
)  # fmt: skip
from rexrag.retrieval.base import Retriever
from rexrag.training.clock import Clock
from rexrag.types import Question, RolloutGroup, Statistics, StepBatch

Score = Callable[[Sequence[Row], float], Sequence[Tensor]]
"""log π of the tokens of rows, at a temperature: float [T] each."""


@dataclass(frozen=True, slots=True)
class StepContext:
    """What a step needs beside its questions. trie: the cue pool, None to continue without a cue.
    learner_policy: scores with the learner's own weights where `mismatch_cap` > 0. scoring: reward and judge
    of answers. judge: the dead-end judge of `dead_ends = "judge"`."""

    policy: Policy
    retriever: Retriever
    trie: CueTrie | None = None
    learner_policy: Policy | None = None
    scoring: Scoring | None = None
    judge: Judge | None = None


def collect(
    questions: Sequence[Question],
    context: StepContext,
    config: Config,
    seed: int,
    more: Callable[[], Sequence[Question]] | None = None,
) -> StepBatch:
    """Draw the rollouts of a step and correct them. METHOD §2 and §3, in their order.

    seed: of this step; the same weights and seed give the same step. more: returns the next questions, while
    too few groups have a signal (`dynamic_sampling`). Groups that are not trained on still count in alpha, z
    and ess, which describe the whole batch that was drawn.
    """
    algorithm, clock = config.algorithm, Clock()
    generator = torch.Generator().manual_seed(seed)
    session = context.policy.session()
    try:
        sampling = _Sampling(context, session, config, generator, clock)
        groups = sampling.draw(questions, seed)
        for redraw in range(1, 1 + algorithm.dynamic_sampling):
            if more is None or groups_with_signal(groups, algorithm, generator) >= len(questions):
                break
            groups += sampling.draw(more(), seed + 2 * redraw)
        generated, prefilled = session.generated_tokens, session.prefilled_tokens
    finally:
        session.close()
    learner = None if context.learner_policy is None else scorer(context.learner_policy)
    batch = correct_groups(groups, config, context.trie, generator, scorer(context.policy), learner)
    samples = batch.samples
    if algorithm.dynamic_sampling:
        chosen = [group for group in batch.groups if group.has_signal][: len(questions)]
        trained = {id(rollout) for group in chosen for rollout in group.trained}
        samples = [sample for sample in samples if id(sample.source) in trained]
    statistics = replace(
        batch.statistics,
        generated_tokens=generated,
        prefilled_tokens=prefilled + batch.statistics.scored_tokens,
        seconds=clock.seconds | batch.statistics.seconds,
    )
    return StepBatch(batch.groups, samples, statistics)


@dataclass(frozen=True, slots=True)
class _Sampling:
    """Draws groups in one session of the policy."""

    context: StepContext
    session: Session
    config: Config
    generator: torch.Generator
    clock: Clock

    def draw(self, questions: Sequence[Question], seed: int) -> tuple[RolloutGroup, ...]:
        """Base rollouts of these questions, and the probes of their dead ends."""
        context, agent, algorithm = self.context, self.config.agent, self.config.algorithm
        # §2.1 N base rollouts a question.
        n, topk, codec = algorithm.rollouts, self.config.retriever.topk, context.policy.codec
        asked = [question for question in questions for _ in range(n)]
        episodes = [Episode(question, codec, agent, topk, scoring=context.scoring) for question in asked]
        self.session.run(episodes, context.retriever, agent.temperature, seed)
        rollouts = [episode.rollout() for episode in episodes]
        episode_of = {id(r): episode for r, episode in zip(rollouts, episodes, strict=True)}
        groups = tuple(
            RolloutGroup(question, tuple(rollouts[i * n : i * n + n])) for i, question in enumerate(questions)
        )
        self.clock.lap("rollout")

        # §2.2–2.4 Find the dead ends, draw which are probed and with which cue; the same policy continues.
        pool_size = None if context.trie is None else len(context.trie)
        plans = plan(groups, algorithm, pool_size, self.generator, context.judge)
        forks = [(p.parent, fork_probe(episode_of[id(p.parent)], p, context.trie)) for p in plans]
        # A probe whose cue does not fit `total_tokens` is left out.
        alive = [(parent, fork) for parent, fork in forks if fork.state is not State.DONE]
        self.session.run([fork for _, fork in alive], context.retriever, agent.temperature, seed + 1)
        groups = with_probes(groups, [fork.probe(parent) for parent, fork in alive])
        self.clock.lap("probe")
        return groups


def fork_probe(episode: Episode, planned: ProbePlan, trie: CueTrie | None) -> Episode:
    """The probe of a finished base rollout, cut and cued; DONE at once where the cue does not fit."""
    cue = () if planned.cue is None or trie is None else trie.cues[planned.cue]
    return episode.fork(cue, planned.cue)


def correct_groups(
    groups: Sequence[RolloutGroup],
    config: Config,
    trie: CueTrie | None,
    generator: torch.Generator,
    score: Score,
    learner_score: Score | None = None,
) -> StepBatch:
    """Filter, correction, advantages: METHOD §3, for rollouts of any engine.

    generator: for filters that keep probes by chance. learner_score: scores with the learner's own weights.
    """
    algorithm, temperature, clock = config.algorithm, config.agent.temperature, Clock()
    # Keep the best ⌊ρ·N_base⌋ probes.
    kept = filter_probes(groups, algorithm, generator)

    # Rows; those whose suffix needs its density without the cue are scored first.
    correction = correction_of(algorithm, trie)
    rows, scored = _score_suffixes(correction.rows(kept), score, temperature)
    weight = None
    if algorithm.mismatch_cap > 0.0 and learner_score is not None:
        sampled = rows
        logps = learner_score(rows, temperature)
        rows = [with_logp(row, logp.tolist()) for row, logp in zip(sampled, logps, strict=True)]
        scored += _tokens(rows)
        weight = sampler_weight(pad(rows), pad(sampled), algorithm.mismatch_cap)
    clock.lap("score")

    # Densities, weights and masks; then group-relative advantages.
    batch = pad(rows)
    streams = correction.streams(batch)
    if weight is not None:
        streams = replace(streams, weight=streams.weight * weight)
    rewards = torch.tensor([row.source.reward for row in rows], dtype=torch.float64)
    advantages = group_advantages(
        rewards, batch.groups, algorithm.advantage_scale, algorithm.advantage_baseline
    )
    samples = make_samples(rows, batch, streams, advantages)
    clock.lap("correct")
    ess = importance_ess(batch, streams)
    figures = Statistics(streams.alpha, streams.failure_rate, ess, scored, clock.seconds)
    return StepBatch(kept, samples, figures)


def scorer(policy: Policy) -> Score:
    """A policy's `score`, of rows."""
    return lambda rows, temperature: policy.score([(row.prompt, row.tokens) for row in rows], temperature)


def _score_suffixes(rows: list[Row], score: Score, temperature: float) -> tuple[list[Row], int]:
    """The rows, with the log-probs of a suffix in its own row where it needs them; and the tokens scored."""
    wanted = [row for row in rows if row.score_suffix]
    logps = iter(score(wanted, temperature) if wanted else ())
    done = [with_suffix_logp(row, next(logps).tolist()) if row.score_suffix else row for row in rows]
    return done, _tokens(wanted)


def _tokens(rows: Sequence[Row]) -> int:
    return sum(len(row.prompt) + len(row.tokens) for row in rows)
