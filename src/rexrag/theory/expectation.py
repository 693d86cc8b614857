"""The exact expectation of each gradient estimator under the real two-stage sampling; nothing is sampled.

One question, N base rollouts, each dead end probed with probability p. A base rollout is one of four kinds:
a probed dead end, an unprobed one, another failure, right. Given how many of each a batch holds, its
rollouts are independent, so a sum over the few possible counts gives the expectation of anything: the
realised alpha, the realised failure rate, the filter's order statistics, the group baseline. A probe shares
its parent's o′: a probed dead end is taken together with its own probe's reward. METHOD §4.4.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rexrag.method.advantages import group_advantages
from rexrag.method.densities import (
    FAILURE_RATE_FLOOR,
    cue_density,
    mixture_log_density,
    probe_log_densities,
)
from rexrag.method.filters import cue_scores
from rexrag.method.objective import clipped_surrogate
from rexrag.method.weights import trajectory_weights
from rexrag.theory.exact_world import ExactWorld

NO_CLIP = 1e9


@dataclass(frozen=True, slots=True)
class Estimator:
    """One way to turn a batch into a gradient. The defaults are the exact setting of METHOD §4.4."""

    probes: bool = True
    correction: Literal["multiple-importance-sampling", "mixture", "none", "context-distillation"] = (
        "multiple-importance-sampling"
    )
    cue_density: Literal["fine", "coarse"] = "fine"
    suffix_weight: Literal["clipped", "truncated-is"] = "clipped"
    prefix_loss: Literal["all", "none"] = "all"
    alpha: Literal["expected", "realised"] = "expected"
    failure_rate: Literal["dead ends", "inaccuracy", "realised"] = "dead ends"
    fail_known: bool = True
    """Use P(fail|o′); otherwise it is taken as 1."""
    explanations: Literal["all", "own"] = "all"
    """own: a base rollout that says a cue by itself is not recognised as something a probe could write."""
    filter: bool = False
    """Keep only the best probe of the batch by mean cue log-prob."""
    baseline: Literal["none", "mean", "std"] = "none"
    clip_high: float = NO_CLIP
    clip_low: float = 1.0


@dataclass(frozen=True, slots=True)
class Counts:
    """How many of N base rollouts are of each kind, and how likely that is."""

    probability: float
    probed: int
    unprobed: int
    other: int
    right: int

    def deciding(self, estimator: Estimator) -> tuple[int, int]:
        """The counts that change what the estimator does; batches that agree in them are added up."""
        grouped = estimator.baseline != "none"
        by_probed = grouped or estimator.filter or estimator.alpha == "realised"
        by_right = grouped or estimator.failure_rate == "realised"
        return (self.probed if by_probed else -1, self.right if by_right else -1)


def expected_gradient(
    world: ExactWorld, estimator: Estimator, rollouts: int = 5, probability: float = 0.2
) -> Tensor:
    """E[estimate] of one batch of one question, float64, flattened like the policy's table."""
    table = world.table.clone().requires_grad_(True)
    base = torch.zeros_like(world.paths.written, dtype=torch.float64)
    probe = torch.zeros(world.probes.origin.shape, dtype=torch.float64)
    alike: dict[tuple[int, int], list[Counts]] = defaultdict(list)
    for counts in _compositions(world, rollouts, probability if estimator.probes else 0.0):
        alike[counts.deciding(estimator)].append(counts)
    for members in alike.values():
        setting = _Setting(world, estimator, members, rollouts, probability)
        base += setting.base_coefficients()
        if setting.expected_kept:
            probe += setting.probe_coefficients()
    rows = world.probes.spliced if estimator.correction == "context-distillation" else world.probes.paths
    total = (base * world.paths.logp(table)).sum() + (probe * rows.logp(table)).sum()
    return torch.autograd.grad(total, table)[0].flatten()


def true_gradient(world: ExactWorld) -> Tensor:
    """∇ E_π[reward], float64, flattened like the policy's table."""
    table = world.table.clone().requires_grad_(True)
    expected = (world.paths.logp(table).sum(1).exp() * world.paths.reward).sum()
    return torch.autograd.grad(expected, table)[0].flatten()


class _Setting:
    """An estimator in batches of like counts: alpha, z, kept probes and the coefficient of each ∇log π."""

    def __init__(
        self,
        world: ExactWorld,
        estimator: Estimator,
        members: Sequence[Counts],
        rollouts: int,
        probability: float,
    ) -> None:
        self.world, self.estimator, self.rollouts = world, estimator, rollouts
        self.counts, self.members = members[0], members
        self.kept = self._kept(self.counts)
        self.expected_kept = sum(m.probability * self._kept(m) for m in members)
        expected = probability * world.dead_rate if estimator.probes else 0.0
        self.alpha = expected / (1 + expected)
        self.divisor = rollouts * (1 + expected)
        if estimator.alpha == "realised":
            self.alpha = self.kept / (rollouts + self.kept)
            self.divisor = float(rollouts + self.kept)
        self.z = {
            "dead ends": world.dead_rate,
            "inaccuracy": 1.0 - world.accuracy,
            "realised": max(FAILURE_RATE_FLOOR, 1.0 - self.counts.right / rollouts),
        }[estimator.failure_rate]

    def _kept(self, counts: Counts) -> int:
        return min(1, counts.probed) if self.estimator.filter else counts.probed

    def base_coefficients(self) -> Tensor:
        """[M, H]: expected count of each path among the base rollouts times what multiplies its ∇log π."""
        world, right = self.world, self.world.paths.reward > 0
        probed = self._expected(sum(m.probability * m.probed for m in self.members), world.dead)
        kinds = (
            (sum(m.probability * m.unprobed for m in self.members), world.dead),
            (sum(m.probability * m.other for m in self.members), ~world.dead & ~right),
            (sum(m.probability * m.right for m in self.members), right),
        )
        unprobed = sum((self._expected(*kind) for kind in kinds), torch.zeros_like(world.probability))
        rows = world.logp
        behaviour, weight = rows, torch.ones(len(rows), dtype=torch.float64)
        if self.estimator.correction == "mixture":
            behaviour = mixture_log_density(rows, torch.full_like(rows, -torch.inf), self.alpha)
        elif self.estimator.correction == "multiple-importance-sampling":
            log_r = self._base_log_ratio()
            weight = trajectory_weights(log_r, self.alpha)
        by_right = torch.zeros(self.kept + 1, len(rows), dtype=torch.float64)
        for expected, cases in ((unprobed, self._siblings(self.kept)), (probed, self._own_and_siblings())):
            for chance, probes_right in cases:
                by_right[probes_right] += chance * expected
        total = torch.zeros_like(rows)
        for probes_right, counted in enumerate(by_right):
            advantage = self._advantages(world.paths.reward, self.counts.right + probes_right, self.kept)
            total += self._coefficients(rows, behaviour, world.paths.written, advantage, counted * weight)
        return total

    def _expected(self, number: float, kind: Tensor) -> Tensor:
        """[M]: expected count of each path where `number` base rollouts are of this kind."""
        inside = torch.where(kind, self.world.probability, 0.0)
        return number * inside / inside.sum() if number else torch.zeros_like(inside)

    def probe_coefficients(self) -> Tensor:
        """[O, H]: the same for the outcomes of the kept probes."""
        world, probes, kind = self.world, self.world.probes, self.estimator.correction
        expected = self.expected_kept * self._kept_share()
        written = probes.paths.written
        logp = probes.logp
        behaviour, weight, truncated = logp, torch.ones(len(logp), dtype=torch.float64), None
        if kind == "multiple-importance-sampling":
            weight = trajectory_weights(self._path_log_ratio()[probes.path], self.alpha)
        elif kind == "mixture":
            density = probe_log_densities(
                logp,
                probes.origin,
                probes.cut,
                cue_density(world.trie.table()[probes.cue], self.estimator.cue_density, len(world.trie)),
                probes.cue_length,
                self.z,
            )
            behaviour = mixture_log_density(logp, density, self.alpha)
        elif kind == "context-distillation":
            logp, behaviour, truncated = self._without_cue(logp)
            written = probes.spliced.written
        if self.estimator.prefix_loss == "none":
            cut = probes.spliced_cut if kind == "context-distillation" else probes.cut
            written = written & (torch.arange(written.shape[1])[None, :] >= cut[:, None])
        reward = probes.paths.reward
        total = torch.zeros_like(logp)
        for chance, others in self._siblings(self.kept - 1):
            right = self.counts.right + others + reward
            advantage = self._advantages(reward, right, self.kept)
            total += self._coefficients(
                logp, behaviour, written, advantage, chance * expected * weight, truncated
            )
        return total

    def _coefficients(
        self,
        logp: Tensor,
        behaviour: Tensor,
        written: Tensor,
        advantage: Tensor,
        weight: Tensor,
        truncated: Tensor | None = None,
    ) -> Tensor:
        """What multiplies each token's ∇log π: the derivative of the surrogate itself, over the divisor."""
        leaf = logp.detach().clone().requires_grad_(True)
        loss, _ = clipped_surrogate(
            leaf,
            behaviour,
            advantage,
            written,
            self.estimator.clip_low,
            self.estimator.clip_high,
            weight=weight[:, None].expand(leaf.shape),
            truncated=truncated,
            aggregation="sequence-sum",
            normalizer=1.0,
        )
        return -torch.autograd.grad(loss, leaf)[0] / self.divisor

    def _without_cue(self, logp: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(log π of the spliced row, what its ratio divides by, which tokens are truncated)."""
        probes = self.world.probes
        spliced = probes.spliced.logp(self.world.table)
        if self.estimator.suffix_weight == "clipped":
            return spliced, spliced, None
        position = torch.arange(logp.shape[1])[None, :]
        is_suffix = position >= probes.spliced_cut[:, None]
        dropped = (probes.cut + probes.cue_length - probes.spliced_cut)[:, None]
        written_by = torch.nn.functional.pad(logp, (0, logp.shape[1])).gather(1, position + dropped)
        return spliced, torch.where(is_suffix, written_by, spliced), is_suffix

    def _path_log_ratio(self) -> Tensor:
        """log r of every path: probing's density over π, summed over the cuts and cues that explain it."""
        world, probes = self.world, self.world.probes
        logp = probes.logp
        spoken = torch.where(probes.origin == 1, logp, 0.0).sum(1)
        fail = probes.fail if self.estimator.fail_known else torch.ones_like(probes.fail)
        ratio = fail * (world.trie.table().sum(1)[probes.cue] - spoken).exp() / self.z
        return torch.zeros_like(world.probability).index_add_(0, probes.path, ratio).log()

    def _base_log_ratio(self) -> Tensor:
        if self.estimator.explanations == "own" or not self.estimator.probes:
            return torch.full_like(self.world.probability, -torch.inf)
        return self._path_log_ratio()

    def _kept_share(self) -> Tensor:
        """Distribution of one kept probe's outcome, float64 [O]: ε, or that of the best-scored of K draws."""
        probes = self.world.probes
        if not self.estimator.filter:
            return probes.share
        index, mass, up_to, below = self._score_levels()
        best = up_to**self.counts.probed - below**self.counts.probed
        return probes.share * (best / mass)[index]

    def _score_levels(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(Level of each outcome's score, lowest first; chance of a draw in, up to and below each level)."""
        probes = self.world.probes
        score = cue_scores(probes.logp, probes.origin).round(decimals=12)
        level, index = torch.unique(score, return_inverse=True)
        mass = torch.zeros_like(level).index_add_(0, index, probes.share)
        up_to = mass.cumsum(0)
        return index, mass, up_to, up_to - mass

    def _siblings(self, probes: int) -> Iterator[tuple[float, int]]:
        """(probability, how many of `probes` sibling probes are right); it matters to a baseline only."""
        if probes <= 0 or self.estimator.baseline == "none":
            return iter([(1.0, 0)])
        return _binomial(probes, self._probe_accuracy())

    def _own_and_siblings(self) -> Iterator[tuple[Tensor | float, int]]:
        """(probability for each parent, float64 [M], how many kept probes are right) where it was probed."""
        if not self.kept or self.estimator.baseline == "none":
            yield 1.0, 0
            return
        own = self._right_given_parent()
        # The filter keeps one probe, the parent's own or another.
        for chance, others in self._siblings(self.kept - 1):
            yield chance * (1 - own), others
            yield chance * own, others + 1

    def _right_given_parent(self) -> Tensor:
        """P(a parent's probe is right | its o′), or that the kept probe of K is: float64 [M], 0 elsewhere."""
        world, probes = self.world, self.world.probes
        right = probes.paths.reward
        if self.estimator.filter:
            draws, (index, mass, up_to, below) = self.counts.probed, self._score_levels()
            accuracy = torch.zeros_like(mass).index_add_(0, index, probes.share * right) / mass
            # Among equal scores the earlier wins: the own probe is each of them equally often.
            wins = (up_to**draws - below**draws) / (draws * mass)
            ties = up_to ** (draws - 1) - wins
            others = (up_to ** (draws - 1) - below ** (draws - 1)) * accuracy
            higher = others.flip(0).cumsum(0).flip(0) - others
            right = wins[index] * right + (ties * accuracy + higher)[index]
        prefixes, parent = torch.unique(world.prefix, return_inverse=True)
        outcome = torch.searchsorted(prefixes, probes.prefix)
        made = torch.zeros(len(prefixes), dtype=torch.float64).index_add_(0, outcome, probes.share)
        hits = torch.zeros_like(made).index_add_(0, outcome, probes.share * right)
        return torch.where(world.dead, (hits / made)[parent], 0.0)

    def _probe_accuracy(self) -> float:
        return float((self._kept_share() * self.world.probes.paths.reward).sum())

    def _advantages(self, reward: Tensor, right: float | Tensor, kept: int) -> Tensor:
        """Advantage of rollouts with `reward` in a group of N + kept in which `right` are right."""
        if self.estimator.baseline == "none":
            return reward
        size = self.rollouts + kept
        scale: Literal["std", "none"] = "std" if self.estimator.baseline == "std" else "none"
        by_total = torch.zeros(size + 1, 2, dtype=torch.float64)
        for total in range(size + 1):
            rewards = (torch.arange(size) < total).double()
            advantage = group_advantages(rewards, torch.zeros(size, dtype=torch.int64), scale)
            by_total[total, 1], by_total[total, 0] = advantage[0], advantage[-1]
        total_right = torch.as_tensor(right, dtype=torch.float64).expand(reward.shape).long()
        return by_total[total_right, reward.long()]


def _compositions(world: ExactWorld, rollouts: int, probability: float) -> Iterator[Counts]:
    z, accuracy = world.dead_rate, world.accuracy
    chances = (probability * z, (1 - probability) * z, 1 - z - accuracy, accuracy)
    for counts in itertools.product(range(rollouts + 1), repeat=4):
        if sum(counts) != rollouts or any(n and c <= 0 for n, c in zip(counts, chances, strict=True)):
            continue
        ways = math.factorial(rollouts) / math.prod(math.factorial(n) for n in counts)
        likely = math.prod(c**n for n, c in zip(counts, chances, strict=True))
        yield Counts(ways * likely, *counts)


def _binomial(draws: int, chance: float) -> Iterator[tuple[float, int]]:
    """(probability, successes)."""
    for successes in range(draws + 1):
        weight = math.comb(draws, successes) * chance**successes * (1 - chance) ** (draws - successes)
        yield weight, successes
