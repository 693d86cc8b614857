"""One step of REX-RAG, on one page. Read it beside the paper (arXiv 2508.08149) or METHOD's sections.

    questions → base rollouts → dead ends → probes → filter → correction → advantages → samples

`collect` samples and decides what to train on; what it returns goes to `Learner.update` as it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rexrag.agent.episode import Episode, State
from rexrag.config import Config, MethodConfig
from rexrag.engine.base import Policy, Session
from rexrag.method.advantages import group_advantages
from rexrag.method.cues import CueTrie
from rexrag.method.dead_ends import is_dead_end
from rexrag.method.filtering import cue_scores, keep_count, keep_probes
from rexrag.method.probing import ProbePlan, in_all_wrong_groups, plan_probes
from rexrag.method.realignment import mismatch_weights
from rexrag.method.samples import (
    Row,
    Streams,
    correct,
    groups_with_signal,
    make_samples,
    pad,
    row_of,
    splice,
    with_tail_logp,
)
from rexrag.retrieval.base import Retriever
from rexrag.types import Origin, Question, Rollout, Sample


@dataclass(frozen=True, slots=True)
class Collected:
    """What a step drew and kept. `rows`, `groups`, `streams` and `advantages` cover base + kept probes."""

    base: list[Rollout]
    probes: list[Rollout]
    scores: Tensor
    kept: Tensor
    rows: list[Row]
    groups: list[int]
    streams: Streams
    advantages: Tensor
    samples: list[Sample]
    generated_tokens: int
    prefilled_tokens: int
    """Read by the sampling model: prompts, evidence, cues, and rows that are scored again."""
    seconds: dict[str, float]


def collect(
    questions: Sequence[Question],
    policy: Policy,
    retriever: Retriever,
    trie: CueTrie | None,
    config: Config,
    keep_ratio: float,
    seed: int,
    learner_policy: Policy | None = None,
    more: Callable[[], Sequence[Question]] | None = None,
) -> Collected:
    """Draw the rollouts of a step and correct them. METHOD §2 and §3, in their order.

    trie: the cue pool, None to continue without a cue. seed: of this step; with the same weights the same
    step comes out. learner_policy: scores with the learner's own weights where `method.mismatch_cap` > 0.
    more: the next questions, asked while too few groups have signal (`method.dynamic_sampling`).
    """
    method, agent = config.method, config.agent
    generator = torch.Generator().manual_seed(seed)
    clock = _Clock()
    session = policy.session()
    try:
        drawn = _Drawn(policy, session, retriever, trie, config, generator, clock)
        drawn.draw(questions, seed)
        for redraw in range(1, 1 + method.dynamic_sampling):
            if more is None or drawn.with_signal() >= len(questions):
                break
            drawn.draw(more(), seed + 2 * redraw)
        generated, prefilled = session.generated_tokens, session.prefilled_tokens
    finally:
        session.close()
    base, group_of, plans, probes = drawn.base, drawn.groups, drawn.plans, drawn.probes

    # §3 Filter: keep the best ⌊ρ·N_base⌋.
    scores = _scores(probes, method, generator)
    keep = len(probes) if method.filter == "none" else keep_count(len(base), keep_ratio)
    kept = keep_probes(scores, keep)
    chosen = [(plan, probe) for plan, probe, k in zip(plans, probes, kept.tolist(), strict=True) if k]

    # §3 Correction: rows, densities, weights and masks; then group-relative advantages.
    rollouts = [*base, *(probe for _, probe in chosen)]
    groups = [*group_of, *(group_of[plan.parent] for plan, _ in chosen)]
    rows, scored = _rows(base, chosen, method, policy, agent.temperature)
    rows, weight = _match(rows, method, learner_policy, agent.temperature)
    clock.lap("score")
    streams = correct(pad(rows, groups, [rollout.em == 1.0 for rollout in rollouts]), method, trie)
    if weight is not None:
        streams = replace(streams, weight=streams.weight * weight)
    rewards = torch.tensor([rollout.reward for rollout in rollouts], dtype=torch.float64)
    advantages = group_advantages(
        rewards, torch.tensor(groups), method.advantage_scale, method.advantage_baseline
    )
    samples = make_samples(rows, groups, streams, advantages)
    if method.dynamic_sampling:
        chosen_groups = groups_with_signal(rewards.tolist(), groups)[: len(questions)]
        samples = [sample for sample in samples if sample.group in chosen_groups]
    clock.lap("correct")
    return Collected(
        base,
        probes,
        scores,
        kept,
        rows,
        groups,
        streams,
        advantages,
        samples,
        generated,
        prefilled + scored,
        clock.seconds,
    )


@dataclass(slots=True)
class _Drawn:
    """What was sampled so far in a session: base rollouts, and probes beside the plans that made them."""

    policy: Policy
    session: Session
    retriever: Retriever
    trie: CueTrie | None
    config: Config
    generator: torch.Generator
    clock: _Clock
    base: list[Rollout] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    """Of each base rollout: the place of its question among all that were asked."""
    plans: list[ProbePlan] = field(default_factory=list)
    probes: list[Rollout] = field(default_factory=list)

    def draw(self, questions: Sequence[Question], seed: int) -> None:
        method, agent, codec = self.config.method, self.config.agent, self.policy.codec
        first, first_group = len(self.base), len(self.base) // method.rollouts
        # §2.1 N base rollouts a question.
        asked = [question for question in questions for _ in range(method.rollouts)]
        groups = [first_group + group for group, _ in enumerate(questions) for _ in range(method.rollouts)]
        episodes = [Episode(question, codec, agent, self.config.retriever.topk) for question in asked]
        self.session.run(episodes, self.retriever, agent.temperature, seed)
        base = [episode.rollout() for episode in episodes]
        self.clock.lap("rollout")

        # §2.2–2.4 Dead ends, a coin and a cue for each, and the same policy goes on from the cut.
        planned = _plan(base, groups, method, self.trie, self.generator)
        made = [(plan, _fork(episodes[plan.parent], plan, first, self.trie)) for plan in planned]
        # A cue that no longer fits the window leaves nothing to go on with.
        alive = [(plan, fork) for plan, fork in made if fork.state is not State.DONE]
        forks = [fork for _, fork in alive]
        self.session.run(forks, self.retriever, agent.temperature, seed + 1)
        self.base += base
        self.groups += groups
        self.plans += [replace(plan, parent=first + plan.parent) for plan, _ in alive]
        self.probes += [fork.rollout() for fork in forks]
        self.clock.lap("probe")

    def with_signal(self) -> int:
        """Groups whose rollouts, probes included, differ in reward."""
        rewards = [rollout.reward for rollout in (*self.base, *self.probes)]
        return len(groups_with_signal(rewards, [*self.groups, *(self.groups[p.parent] for p in self.plans)]))


def _plan(
    base: Sequence[Rollout],
    groups: Sequence[int],
    method: MethodConfig,
    trie: CueTrie | None,
    generator: torch.Generator,
) -> list[ProbePlan]:
    if not method.probe:
        return []
    right = [rollout.em == 1.0 for rollout in base]
    hopeless = in_all_wrong_groups(right, groups)
    dead = [
        index
        for index, rollout in enumerate(base)
        if is_dead_end(rollout, right[index], method.dead_ends, method.probe_forced_turn)
        and (method.probe_groups == "all" or hopeless[index])
    ]
    return plan_probes(dead, method.probe_probability, None if trie is None else len(trie), generator)


def _fork(episode: Episode, plan: ProbePlan, first: int, trie: CueTrie | None) -> Episode:
    cue = () if plan.cue is None or trie is None else trie.cues[plan.cue]
    return episode.fork(cue, plan.cue, first + plan.parent)


def _scores(probes: Sequence[Rollout], method: MethodConfig, generator: torch.Generator) -> Tensor:
    """What the filter ranks by. Without cues there is nothing to rate, so the draw is random."""
    chance = torch.rand(len(probes), generator=generator)
    if method.filter == "oracle":
        return torch.tensor([rollout.em for rollout in probes]) + 0.5 * chance
    if method.filter == "random" or method.cues == "none" or not probes:
        return chance
    batch = pad([row_of(rollout) for rollout in probes], [0] * len(probes), [False] * len(probes))
    return cue_scores(batch.policy_logp, batch.origin)


def _rows(
    base: Sequence[Rollout],
    chosen: Sequence[tuple[ProbePlan, Rollout]],
    method: MethodConfig,
    policy: Policy,
    temperature: float,
) -> tuple[list[Row], int]:
    """The token rows to train on, and how many tokens had to be scored for them."""
    rows = [row_of(rollout) for rollout in base]
    if method.realignment != "internalize":
        return [*rows, *(row_of(probe) for _, probe in chosen)], 0
    spliced = [splice(probe, base[plan.parent]) for plan, probe in chosen]
    if method.tail == "truncated":
        return [*rows, *spliced], 0
    logps = policy.score([(row.prompt, row.tokens) for row in spliced], temperature)
    spliced = [with_tail_logp(row, logp.tolist()) for row, logp in zip(spliced, logps, strict=True)]
    return [*rows, *spliced], sum(len(row.prompt) + len(row.tokens) for row in spliced)


def _match(
    rows: list[Row], method: MethodConfig, learner_policy: Policy | None, temperature: float
) -> tuple[list[Row], Tensor | None]:
    """Rows under the learner's own log π_old, and the weight that corrects the sampler's numerics."""
    if method.mismatch_cap == 0.0 or learner_policy is None:
        return rows, None
    logps = learner_policy.score([(row.prompt, row.tokens) for row in rows], temperature)
    matched = [
        replace(
            row,
            policy_logp=tuple(
                new if origin in (Origin.POLICY, Origin.CUE) else old
                for new, old, origin in zip(logp.tolist(), row.policy_logp, row.origins, strict=True)
            ),
        )
        for row, logp in zip(rows, logps, strict=True)
    ]
    zeros = [0] * len(rows)
    unmatched, learned = (pad(r, zeros, [False] * len(rows)).policy_logp for r in (rows, matched))
    return matched, mismatch_weights(learned, unmatched, method.mismatch_cap)


class _Clock:
    """Seconds of each phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now
