"""Kept rollouts → densities, masks and weights → training rows.

row_of / splice     a rollout as the tokens it is trained on
pad                 rows → one padded Batch of tensors
correct             Batch → Streams: what each token is divided by, weighted with, and whether it trains
make_samples        rows + Streams + advantages → Samples for an engine
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rexrag.config.schema import MethodConfig
from rexrag.errors import CueError, CutError
from rexrag.method.cues import CueTrie
from rexrag.method.dead_ends import last_cut
from rexrag.method.densities import (
    effective_sample_size,
    explanation_log_ratios,
    failure_rates,
    guard_alpha,
    mixture_densities,
    mixture_shares,
    probe_log_densities,
    trajectory_weights,
)
from rexrag.types import Origin, Rollout, Sample, Segment

PADDING = -1
"""Origin of a padded position."""
ANYWHERE = 2**31 - 1
"""As `last_cut`: no position is too late."""


@dataclass(frozen=True, slots=True)
class Row:
    """What is trained of one rollout. `cut` is −1 for a base rollout; `cue` is −1 where there is no cue."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    origins: tuple[int, ...]
    policy_logp: tuple[float, ...]
    cut: int = -1
    cue: int = -1
    cue_length: int = 0
    last_cut: int = ANYWHERE
    """`dead_ends.last_cut`: where `trajectory` looks for words that a probe could have been given."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of a step as tensors, padded on the right: tokens, origin int64 [B, T], policy_logp float [B, T];
    cut, cue, cue_length, last_cut, groups int64 [B]; right bool [B]. Base rollouts come before probes."""

    tokens: Tensor
    origin: Tensor
    policy_logp: Tensor
    cut: Tensor
    cue: Tensor
    cue_length: Tensor
    last_cut: Tensor
    groups: Tensor
    right: Tensor

    @property
    def is_probe(self) -> Tensor:
        return self.cut >= 0


@dataclass(frozen=True, slots=True)
class Streams:
    """Per token [B, T]: log μ, weight, trained or not, truncated or not, `Segment`; and what they rest on."""

    behaviour_logp: Tensor
    weight: Tensor
    mask: Tensor
    truncated: Tensor
    segment: Tensor
    alpha: float
    failure_rate: float
    ess: float
    """Effective sample size of the trained tokens' weights π_old/μ, as a share of their number."""


def row_of(rollout: Rollout, method: MethodConfig) -> Row:
    """The rollout as it was written."""
    return Row(
        rollout.prompt,
        rollout.tokens,
        rollout.origins,
        rollout.logps,
        -1 if rollout.cut is None else rollout.cut,
        -1 if rollout.cue is None else rollout.cue,
        rollout.cue_length,
        last_cut(rollout, method.dead_ends, method.probe_forced_turn),
    )


def splice(probe: Rollout, parent: Rollout) -> Row:
    """`internalize`: o′ without its closing `</think>`, then straight on with o″; the cue leaves no trace.

    The cut of the result is where o″ begins. Its policy_logp there is still log π_old(o″|q, o′, h): the
    density that wrote it. Raises CutError for a rollout that is no probe.
    """
    if probe.cut is None:
        raise CutError("cut = None: only a probe can be spliced")
    last = parent.turns[-1] if parent.turns else None
    thought_end = last.thought_end if last is not None else None
    end = probe.cut if thought_end is None else min(thought_end, probe.cut)
    tail = probe.cut + probe.cue_length
    return Row(
        probe.prompt,
        probe.tokens[:end] + probe.tokens[tail:],
        probe.origins[:end] + probe.origins[tail:],
        probe.logps[:end] + probe.logps[tail:],
        cut=end,
    )


def with_tail_logp(row: Row, logp: Sequence[float]) -> Row:
    """A spliced row whose o″ is held against its own density, log π_old(o″|q, o′) (`tail = one`)."""
    tail = tuple(
        new if origin == Origin.POLICY else old
        for new, old, origin in zip(
            logp[row.cut :], row.policy_logp[row.cut :], row.origins[row.cut :], strict=True
        )
    )
    return replace(row, policy_logp=row.policy_logp[: row.cut] + tail)


def pad(rows: Sequence[Row], groups: Sequence[int], right: Sequence[bool]) -> Batch:
    """Rows to tensors; tokens and log-probs are padded with 0, origins with PADDING."""

    def stack(values: Sequence[Sequence[float]], dtype: torch.dtype, fill: float) -> Tensor:
        return pad_sequence([torch.tensor(v, dtype=dtype) for v in values], True, fill)

    return Batch(
        tokens=stack([row.tokens for row in rows], torch.int64, 0),
        origin=stack([row.origins for row in rows], torch.int64, PADDING),
        policy_logp=stack([row.policy_logp for row in rows], torch.float32, 0.0),
        cut=torch.tensor([row.cut for row in rows]),
        cue=torch.tensor([row.cue for row in rows]),
        cue_length=torch.tensor([row.cue_length for row in rows]),
        last_cut=torch.tensor([row.last_cut for row in rows]),
        groups=torch.tensor(groups),
        right=torch.tensor(right, dtype=torch.bool),
    )


def correct(batch: Batch, config: MethodConfig, trie: CueTrie | None) -> Streams:
    """Densities, weights and masks of a batch; METHOD §3 in one place.

    trie: the cue pool; None where probes carry no cue. Raises AlphaError (guard), CueError, and what the
    densities raise.
    """
    probe_rows = batch.is_probe.nonzero(as_tuple=True)[0]
    base = ~batch.is_probe
    rate = failure_rates(batch.right[base], batch.groups[base], "batch")
    z = float(rate[0]) if len(rate) else 1.0
    z_B = torch.full_like(batch.cut, z, dtype=torch.float64)
    if config.failure_rate == "question":
        z_B = _per_question(batch, base, z_B)
    alpha_B = mixture_shares(batch.is_probe, batch.groups, config.alpha)

    mask = _trained(batch, config, trie)
    behaviour, weight = batch.policy_logp, torch.ones_like(batch.policy_logp)
    truncated = torch.zeros_like(mask)
    if config.realignment == "paper" and len(probe_rows):
        guard_alpha(alpha_B, config.clip_high, config.allow_large_alpha)
        density = _probe_densities(batch, probe_rows, z_B, config, trie)
        behaviour = mixture_densities(batch.policy_logp, probe_rows, density, alpha_B)
    elif config.realignment == "trajectory" and len(probe_rows):
        if trie is None:
            raise CueError("trajectory realignment needs cues; a continuation without one has no density")
        log_r = explanation_log_ratios(
            batch.tokens, batch.policy_logp, batch.origin, trie.cues, trie.table(), z_B, batch.last_cut
        )
        weight = weight * trajectory_weights(log_r, alpha_B).to(weight.dtype)[:, None]
    elif config.realignment == "internalize" and config.tail != "one":
        truncated = batch.is_probe[:, None] & (_positions(batch) >= batch.cut[:, None])

    importance = torch.exp(batch.policy_logp - behaviour) * weight
    trained = importance[mask]
    return Streams(
        behaviour_logp=behaviour,
        weight=weight,
        mask=mask,
        truncated=truncated,
        segment=_segments(batch),
        alpha=float(batch.is_probe.double().mean()) if len(batch.cut) else 0.0,
        failure_rate=z,
        ess=effective_sample_size(trained) / max(1, len(trained)),
    )


def make_samples(
    rows: Sequence[Row], groups: Sequence[int], streams: Streams, advantages: Tensor
) -> list[Sample]:
    """One Sample a row, streams cut to its own length."""
    samples = []
    plain = bool((streams.weight == 1).all())
    clipped = not bool(streams.truncated.any())
    for i, (row, group) in enumerate(zip(rows, groups, strict=True)):
        n = len(row.tokens)
        samples.append(
            Sample(
                prompt=row.prompt,
                tokens=row.tokens,
                mask=tuple(streams.mask[i, :n].tolist()),
                behaviour_logp=tuple(streams.behaviour_logp[i, :n].tolist()),
                advantage=float(advantages[i]),
                weight=() if plain else tuple(streams.weight[i, :n].tolist()),
                truncated=() if clipped else tuple(streams.truncated[i, :n].tolist()),
                segment=tuple(streams.segment[i, :n].tolist()),
                group=group,
            )
        )
    return samples


def groups_with_signal(rewards: Sequence[float], groups: Sequence[int]) -> list[int]:
    """Groups whose rewards differ, in order: the only ones that dynamic sampling trains on (DAPO §3.2)."""
    seen: dict[int, set[float]] = {}
    for reward, group in zip(rewards, groups, strict=True):
        seen.setdefault(group, set()).add(reward)
    return [group for group, values in seen.items() if len(values) > 1]


def _positions(batch: Batch) -> Tensor:
    return torch.arange(batch.origin.shape[1], device=batch.origin.device)[None, :]


def _trained(batch: Batch, config: MethodConfig, trie: CueTrie | None) -> Tensor:
    """POLICY tokens, those of a probe's o′ as `prefix_loss` says, and the cue tokens that `cue_loss` names
    (`first` is the pool's common opening)."""
    mask = batch.origin == int(Origin.POLICY)
    if config.prefix_loss == "none":
        mask = mask & (_positions(batch) >= batch.cut[:, None])
    trained_cue = {"all": None, "first": trie.opening if trie else 0, "none": 0}[config.cue_loss]
    is_cue = batch.origin == int(Origin.CUE)
    if trained_cue is not None:
        is_cue = is_cue & (_positions(batch) < (batch.cut + trained_cue)[:, None])
    return mask | is_cue


def _segments(batch: Batch) -> Tensor:
    position, cut = _positions(batch), batch.cut[:, None]
    probe = torch.where(position < cut, int(Segment.PREFIX), int(Segment.SUFFIX))
    probe = torch.where(batch.origin == int(Origin.CUE), int(Segment.CUE), probe)
    return torch.where(batch.is_probe[:, None], probe, int(Segment.BASE))


def _probe_densities(
    batch: Batch, rows: Tensor, z_B: Tensor, config: MethodConfig, trie: CueTrie | None
) -> Tensor:
    cue_logp = torch.zeros(len(rows), 0, dtype=torch.float64)
    if trie is not None:
        cue_logp = trie.table()[batch.cue[rows].clamp(min=0)]
    return probe_log_densities(
        batch.policy_logp[rows].double(),
        batch.origin[rows],
        batch.cut[rows],
        cue_logp,
        batch.cue_length[rows],
        z_B[rows],
        config.cue_density,
        len(trie) if trie is not None else 1,
    )


def _per_question(batch: Batch, base: Tensor, z_B: Tensor) -> Tensor:
    """z of each row's own question; a probe takes its group's."""
    z = z_B.clone()
    z[base] = failure_rates(batch.right[base], batch.groups[base], "question")
    by_group = dict(zip(batch.groups[base].tolist(), z[base].tolist(), strict=True))
    for row in batch.is_probe.nonzero(as_tuple=True)[0].tolist():
        z[row] = by_group.get(int(batch.groups[row]), float(z[row]))
    return z
