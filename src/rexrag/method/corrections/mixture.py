"""The paper's correction: the balance heuristic for each token (REX-RAG Eq. 5 and 6).

log μ_t = logaddexp(log(1−α) + log π_old,t, log α + log μ_ε,t);    ratio = π_θ / μ
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rexrag.config.algorithms import RexRag
from rexrag.method.corrections.base import cue_tokens, on_policy, rows_as_written, trained_tokens
from rexrag.method.cues import CueTrie
from rexrag.method.densities import (
    cue_density,
    failure_rates,
    guard_alpha,
    mixture_densities,
    mixture_shares,
    probe_log_densities,
)
from rexrag.method.rows import Batch, Row, Streams
from rexrag.types import RolloutGroup


@dataclass(frozen=True, slots=True)
class Mixture:
    """trie: the cue pool; None where probes carry no cue."""

    algorithm: RexRag
    trie: CueTrie | None

    def rows(self, groups: Sequence[RolloutGroup]) -> list[Row]:
        return rows_as_written(groups)

    def streams(self, batch: Batch) -> Streams:
        """Raises AlphaError (guard), CueError, and what the densities raise."""
        algorithm = self.algorithm
        prefix = algorithm.prefix_loss == "all"
        plain = on_policy(batch, trained_tokens(batch, prefix, cue_tokens(algorithm, self.trie)))
        probes = batch.is_probe.nonzero(as_tuple=True)[0]
        if not len(probes):
            return plain
        alpha_B = mixture_shares(batch.is_probe, batch.groups, algorithm.alpha)
        guard_alpha(alpha_B, algorithm.clip_high, algorithm.allow_large_alpha)
        z_B = torch.full_like(batch.cut, plain.failure_rate, dtype=torch.float64)
        if algorithm.failure_rate == "question":
            z_B = _per_question(batch, z_B)
        density = self._probe_densities(batch, probes, z_B[probes])
        behaviour = mixture_densities(batch.policy_logp, probes, density, alpha_B)
        return replace(plain, behaviour_logp=behaviour)

    def _probe_densities(self, batch: Batch, probes: Tensor, z_K: Tensor) -> Tensor:
        cue_logp = torch.zeros(len(probes), 0, dtype=torch.float64)
        if self.trie is not None:
            shares = self.trie.table()[batch.cue[probes].clamp(min=0)]
            cue_logp = cue_density(shares, self.algorithm.cue_density, len(self.trie))
        return probe_log_densities(
            batch.policy_logp[probes].double(),
            batch.origin[probes],
            batch.cut[probes],
            cue_logp,
            batch.cue_length[probes],
            z_K,
        )


def _per_question(batch: Batch, z_B: Tensor) -> Tensor:
    """z of each row's own question; a probe takes its group's."""
    base, z = ~batch.is_probe, z_B.clone()
    z[base] = failure_rates(batch.correct[base], batch.groups[base], "question")
    by_group = dict(zip(batch.groups[base].tolist(), z[base].tolist(), strict=True))
    for row in batch.is_probe.nonzero(as_tuple=True)[0].tolist():
        z[row] = by_group.get(int(batch.groups[row]), float(z[row]))
    return z
