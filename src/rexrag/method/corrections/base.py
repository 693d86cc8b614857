"""The protocol of a correction, and the rows and streams that corrections share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from rexrag.config.algorithms import RexRag
from rexrag.method.cues import CueTrie
from rexrag.method.densities import failure_rates
from rexrag.method.rows import Batch, Row, Streams, probe_row, row_of
from rexrag.types import Origin, Probe, RolloutGroup


class Correction(Protocol):
    """How a batch that contains probes is trained [METHOD §3]."""

    def rows(self, groups: Sequence[RolloutGroup]) -> list[Row]:
        """What is trained: every base rollout, then every kept probe."""
        ...

    def streams(self, batch: Batch) -> Streams:
        """For each token: log μ, weight, and whether it is trained."""
        ...


def base_rows(groups: Sequence[RolloutGroup]) -> list[Row]:
    """A row for every base rollout, in order."""
    return [row_of(rollout, i) for i, group in enumerate(groups) for rollout in group.rollouts]


def kept_probes(groups: Sequence[RolloutGroup]) -> list[tuple[Probe, int]]:
    """Kept probes in order, each with the number of its group."""
    return [(probe, i) for i, group in enumerate(groups) for probe in group.kept]


def rows_as_written(groups: Sequence[RolloutGroup]) -> list[Row]:
    """Every base rollout, then every kept probe with its cue."""
    return [*base_rows(groups), *(probe_row(probe, i) for probe, i in kept_probes(groups))]


def trained_tokens(batch: Batch, prefix: bool = True, cue_tokens: int | None = None) -> Tensor:
    """bool [B, T]: POLICY tokens, of a probe's o′ only if `prefix`, and the first `cue_tokens` of a cue.

    cue_tokens None trains whole cues.
    """
    mask = batch.origin == int(Origin.POLICY)
    if not prefix:
        mask = mask & (batch.position >= batch.cut[:, None])
    is_cue = batch.origin == int(Origin.CUE)
    if cue_tokens is not None:
        is_cue = is_cue & (batch.position < (batch.cut + cue_tokens)[:, None])
    return mask | is_cue


def cue_tokens(algorithm: RexRag, trie: CueTrie | None) -> int | None:
    """How many tokens of a cue are trained (`cue_loss`); None: all. "first" is the pool's common opening."""
    return {"all": None, "first": trie.opening if trie else 0, "none": 0}[algorithm.cue_loss]


def on_policy(batch: Batch, mask: Tensor) -> Streams:
    """Streams of plain GRPO: each ratio divides by π_old, each weight is 1. mask: bool [B, T]."""
    base = ~batch.is_probe
    rate = failure_rates(batch.correct[base], batch.groups[base], "batch")
    return Streams(
        behaviour_logp=batch.policy_logp,
        weight=torch.ones_like(batch.policy_logp),
        mask=mask,
        truncated=torch.zeros_like(mask),
        alpha=float(batch.is_probe.double().mean()) if len(batch.cut) else 0.0,
        failure_rate=float(rate[0]) if len(rate) else 1.0,
    )
