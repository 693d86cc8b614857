"""One step of REX-RAG, on one page. Read it beside the paper (arXiv 2508.08149) or METHOD's sections.

    questions → base rollouts → dead ends → probes → filter → correction → advantages → samples

`collect` samples and decides what to train on; what it returns goes to `Learner.update` as it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from rexrag.agent.episode import Episode, State
from rexrag.config.schema import Config, MethodConfig
from rexrag.engine.base import Policy, Session
from rexrag.method.advantages import group_advantages
from rexrag.method.cues import CueTrie
from rexrag.method.dead_ends import is_dead_end
from rexrag.method.densities import mismatch_weights
from rexrag.method.filters import cue_scores, keep_count, keep_probes
from rexrag.method.probing import ProbePlan, in_all_wrong_groups, plan_probes
from rexrag.method.rows import (
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

Score = Callable[[Sequence[tuple[Sequence[int], Sequence[int]]], float], list[Tensor]]
"""`engine.base.Policy.score`."""


@dataclass(frozen=True, slots=True)
class Corrected:
    """What a step kept, ready to train on. `rows`, `groups`, `streams`, `advantages`: base + kept probes."""

    scores: Tensor
    kept: Tensor
    rows: list[Row]
    groups: list[int]
    streams: Streams
    advantages: Tensor
    samples: list[Sample]
    scored_tokens: int
    """Read by the model once more, to score spliced rows."""
    seconds: dict[str, float]
    """Of each phase, so far as it was done here."""


@dataclass(frozen=True, slots=True)
class Collected(Corrected):
    """What a step drew, and what it kept."""

    base: list[Rollout]
    probes: list[Rollout]
    generated_tokens: int
    prefilled_tokens: int
    """Read by the sampling model: prompts, evidence, cues, and rows that are scored again."""


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
    more: the next questions, asked while too few groups have signal (`method.dynamic_sampling`). Groups that
    are not trained on still count in alpha, z and ess: these describe the mixture that drew the batch.
    """
    method = config.method
    generator = torch.Generator().manual_seed(seed)
    clock = _Clock()
    session = policy.session()
    try:
        drawn = _Drawn(policy, session, retriever, trie, config, generator, clock)
        drawn.draw(questions, seed)
        for redraw in range(1, 1 + method.dynamic_sampling):
            if more is None or drawn.with_signal(keep_ratio) >= len(questions):
                break
            drawn.draw(more(), seed + 2 * redraw)
        generated, prefilled = session.generated_tokens, session.prefilled_tokens
    finally:
        session.close()
    corrected = correct_rollouts(
        drawn.base,
        drawn.groups,
        drawn.probes,
        policy.score,
        trie,
        config,
        keep_ratio,
        generator,
        None if learner_policy is None else learner_policy.score,
    )
    known = {field.name: getattr(corrected, field.name) for field in fields(Corrected)}
    if method.dynamic_sampling:
        rewards = [rollout.reward for rollout in (*drawn.base, *kept_probes(drawn.probes, corrected.kept))]
        chosen = groups_with_signal(rewards, corrected.groups)[: len(questions)]
        known["samples"] = [sample for sample in corrected.samples if sample.group in chosen]
    known["seconds"] = clock.seconds | corrected.seconds
    return Collected(
        **known,
        base=drawn.base,
        probes=drawn.probes,
        generated_tokens=generated,
        prefilled_tokens=prefilled + corrected.scored_tokens,
    )


def correct_rollouts(
    base: Sequence[Rollout],
    group_of: Sequence[int],
    probes: Sequence[Rollout],
    score: Score,
    trie: CueTrie | None,
    config: Config,
    keep_ratio: float,
    generator: torch.Generator,
    learner_score: Score | None = None,
    on_kept: Callable[[Tensor], None] = lambda kept: None,
) -> Corrected:
    """Filter, correction, advantages: METHOD §3, for rollouts of any engine.

    group_of: the question of each base rollout. Probes name their base rollout in `parent`. on_kept hears
    which probes were kept (bool [K]) before any row is scored.
    """
    method, clock = config.method, _Clock()
    # Keep the best ⌊ρ·N_base⌋.
    scores, kept = _filter(base, group_of, probes, method, keep_ratio, generator)
    chosen = kept_probes(probes, kept)
    on_kept(kept)

    # Rows, densities, weights and masks; then group-relative advantages.
    rollouts = [*base, *chosen]
    groups = [*group_of, *(group_of[_parent(probe)] for probe in chosen)]
    rows, scored = _rows(base, chosen, method, score, config.agent.temperature)
    rows, weight, matched = _match(rows, method, learner_score, config.agent.temperature)
    clock.lap("score")
    streams = correct(pad(rows, groups, [rollout.em == 1.0 for rollout in rollouts]), method, trie)
    if weight is not None:
        streams = replace(streams, weight=streams.weight * weight)
    rewards = torch.tensor([rollout.reward for rollout in rollouts], dtype=torch.float64)
    advantages = group_advantages(
        rewards, torch.tensor(groups), method.advantage_scale, method.advantage_baseline
    )
    samples = make_samples(rows, groups, streams, advantages)
    clock.lap("correct")
    return Corrected(
        scores, kept, rows, groups, streams, advantages, samples, scored + matched, clock.seconds
    )


def kept_probes(probes: Sequence[Rollout], kept: Tensor) -> list[Rollout]:
    """The probes that the filter kept, in order."""
    return [probe for probe, keep in zip(probes, kept.tolist(), strict=True) if keep]


@dataclass(slots=True)
class _Drawn:
    """What was sampled so far in a session: base rollouts, and probes that name theirs in `parent`."""

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
        planned = plan(base, groups, method, self.trie, self.generator)
        made = [fork_probe(episodes[probe.parent], probe, self.trie, first) for probe in planned]
        # A cue that no longer fits the window leaves nothing to go on with.
        forks = [fork for fork in made if fork.state is not State.DONE]
        self.session.run(forks, self.retriever, agent.temperature, seed + 1)
        self.base += base
        self.groups += groups
        self.probes += [fork.rollout() for fork in forks]
        self.clock.lap("probe")

    def with_signal(self, keep_ratio: float) -> int:
        """Groups whose rollouts, with the probes that the filter would keep, differ in reward."""
        # A copy of the generator: looking must not change what the filter draws in the end.
        generator = torch.Generator().set_state(self.generator.get_state())
        _, kept = _filter(self.base, self.groups, self.probes, self.config.method, keep_ratio, generator)
        chosen = kept_probes(self.probes, kept)
        rewards = [rollout.reward for rollout in (*self.base, *chosen)]
        return len(groups_with_signal(rewards, [*self.groups, *(self.groups[_parent(p)] for p in chosen)]))


def plan(
    base: Sequence[Rollout],
    groups: Sequence[int],
    method: MethodConfig,
    trie: CueTrie | None,
    generator: torch.Generator,
) -> list[ProbePlan]:
    """Which base rollouts are probed, and with which cue. METHOD §2.2–2.4."""
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


def fork_probe(episode: Episode, planned: ProbePlan, trie: CueTrie | None, first: int = 0) -> Episode:
    """The probe of a finished base rollout, cut and cued; DONE at once where the cue does not fit.

    first: index in the step of the base rollout that the plan calls 0.
    """
    cue = () if planned.cue is None or trie is None else trie.cues[planned.cue]
    return episode.fork(cue, planned.cue, first + planned.parent)


def _parent(probe: Rollout) -> int:
    assert probe.parent is not None
    return probe.parent


def _filter(
    base: Sequence[Rollout],
    group_of: Sequence[int],
    probes: Sequence[Rollout],
    method: MethodConfig,
    keep_ratio: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """The probes' scores, and which of them are kept."""
    scores = _scores(probes, method, generator)
    keep = len(probes) if method.filter == "none" else keep_count(len(base), keep_ratio)
    allowed = [method.filter != "right" or rollout.em == 1.0 for rollout in probes]
    groups = [group_of[_parent(probe)] for probe in probes]
    return scores, keep_probes(scores, keep, allowed, groups, method.keep_per_group)


def _scores(probes: Sequence[Rollout], method: MethodConfig, generator: torch.Generator) -> Tensor:
    """What the filter ranks by. Without cues there is nothing to rate, so the draw is random."""
    chance = torch.rand(len(probes), generator=generator)
    if method.filter in ("random", "right") or method.cues == "none" or not probes:
        return chance
    batch = pad([row_of(rollout, method) for rollout in probes], [0] * len(probes), [False] * len(probes))
    return cue_scores(batch.policy_logp, batch.origin)


def _rows(
    base: Sequence[Rollout],
    chosen: Sequence[Rollout],
    method: MethodConfig,
    score: Score,
    temperature: float,
) -> tuple[list[Row], int]:
    """The token rows to train on, and how many tokens had to be scored for them."""
    rows = [row_of(rollout, method) for rollout in base]
    if method.realignment != "internalize":
        return [*rows, *(row_of(probe, method) for probe in chosen)], 0
    spliced = [splice(probe, base[_parent(probe)]) for probe in chosen]
    if method.tail == "truncated":
        return [*rows, *spliced], 0
    logps = score([(row.prompt, row.tokens) for row in spliced], temperature)
    spliced = [with_tail_logp(row, logp.tolist()) for row, logp in zip(spliced, logps, strict=True)]
    return [*rows, *spliced], _tokens(spliced)


def _tokens(rows: Sequence[Row]) -> int:
    return sum(len(row.prompt) + len(row.tokens) for row in rows)


def _match(
    rows: list[Row], method: MethodConfig, score: Score | None, temperature: float
) -> tuple[list[Row], Tensor | None, int]:
    """Rows under the learner's own log π_old, the weight for the sampler's numerics, tokens scored."""
    if method.mismatch_cap == 0.0 or score is None:
        return rows, None, 0
    logps = score([(row.prompt, row.tokens) for row in rows], temperature)
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
    sampled, learned = (pad(r, zeros, [False] * len(rows)) for r in (rows, matched))
    weight = mismatch_weights(learned.policy_logp, sampled.policy_logp, method.mismatch_cap)
    # The sampler never drew the cue.
    weight = torch.where(sampled.origin == int(Origin.CUE), 1.0, weight)
    return matched, weight, _tokens(rows)


class _Clock:
    """Seconds of each phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now
