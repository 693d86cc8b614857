"""Rollouts as training rows, and rows as tensors.

row_of        a rollout as it was written
pad           rows → one padded Batch of tensors
Streams       log μ, weight and mask of each token; made by a correction
make_samples  rows + Streams + advantages → Samples for an engine
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rexrag.method.weights import effective_sample_size, mismatch_weights
from rexrag.types import Origin, Probe, Rollout, Sample, Segment

PADDING = -1
"""Origin of a padded position."""


@dataclass(frozen=True, slots=True)
class Row:
    """The sequence trained for one rollout. `cut` is −1 for a base rollout, `cue` −1 without a cue."""

    source: Rollout
    tokens: tuple[int, ...]
    origins: tuple[int, ...]
    policy_logp: tuple[float, ...]
    group: int = 0
    cut: int = -1
    cue: int = -1
    cue_length: int = 0
    score_suffix: bool = False
    """The tokens from `cut` on need their log π_old in this row: score it with the policy."""

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.source.prompt


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of a step as tensors, padded on the right.

    origin: int64 [B, T]; policy_logp: float [B, T]; cut, cue, cue_length, groups: int64 [B]; correct: bool
    [B]. Base rollouts come before probes.
    """

    origin: Tensor
    policy_logp: Tensor
    cut: Tensor
    cue: Tensor
    cue_length: Tensor
    groups: Tensor
    correct: Tensor

    @property
    def is_probe(self) -> Tensor:
        return self.cut >= 0

    @property
    def position(self) -> Tensor:
        """int64 [1, T]."""
        return torch.arange(self.origin.shape[1], device=self.origin.device)[None, :]


@dataclass(frozen=True, slots=True)
class Streams:
    """Per token [B, T]: log μ, weight, trained or not, truncated or not; and their α and z."""

    behaviour_logp: Tensor
    weight: Tensor
    mask: Tensor
    truncated: Tensor
    alpha: float
    """Share of probes among the rows."""
    failure_rate: float
    """z, the share of wrong base rollouts."""


def row_of(rollout: Rollout, group: int) -> Row:
    """A base rollout as it was written. group: number of its question in the step."""
    return Row(rollout, rollout.tokens, rollout.origins, rollout.logps, group)


def probe_row(probe: Probe, group: int) -> Row:
    """A probe as it was written, cue included."""
    cue = -1 if probe.cue is None else probe.cue
    return replace(row_of(probe.rollout, group), cut=probe.cut, cue=cue, cue_length=probe.cue_length)


def with_suffix_logp(row: Row, logp: Sequence[float]) -> Row:
    """The row with another log π_old for POLICY tokens from its cut on. logp: one a token of the row."""
    suffix = tuple(
        new if origin == Origin.POLICY else old
        for new, old, origin in zip(
            logp[row.cut :], row.policy_logp[row.cut :], row.origins[row.cut :], strict=True
        )
    )
    return replace(row, policy_logp=row.policy_logp[: row.cut] + suffix)


def with_logp(row: Row, logp: Sequence[float]) -> Row:
    """The row with another log π_old for its POLICY and CUE tokens. logp: one a token of the row."""
    return replace(
        row,
        policy_logp=tuple(
            new if origin in (Origin.POLICY, Origin.CUE) else old
            for new, old, origin in zip(logp, row.policy_logp, row.origins, strict=True)
        ),
    )


def pad(rows: Sequence[Row]) -> Batch:
    """Rows to tensors; log-probs are padded with 0, origins with PADDING."""

    def stack(values: Sequence[Sequence[float]], dtype: torch.dtype, fill: float) -> Tensor:
        return pad_sequence([torch.tensor(v, dtype=dtype) for v in values], True, fill)

    return Batch(
        origin=stack([row.origins for row in rows], torch.int64, PADDING),
        policy_logp=stack([row.policy_logp for row in rows], torch.float32, 0.0),
        cut=torch.tensor([row.cut for row in rows]),
        cue=torch.tensor([row.cue for row in rows]),
        cue_length=torch.tensor([row.cue_length for row in rows]),
        groups=torch.tensor([row.group for row in rows]),
        correct=torch.tensor([row.source.correct for row in rows], dtype=torch.bool),
    )


def segments(batch: Batch) -> Tensor:
    """`Segment` of each token: int64 [B, T]."""
    probe = torch.where(batch.position < batch.cut[:, None], int(Segment.PREFIX), int(Segment.SUFFIX))
    probe = torch.where(batch.origin == int(Origin.CUE), int(Segment.CUE), probe)
    return torch.where(batch.is_probe[:, None], probe, int(Segment.BASE))


def importance_ess(batch: Batch, streams: Streams) -> float:
    """Effective sample size of the trained tokens' weights π_old/μ, as a share of their number."""
    importance = torch.exp(batch.policy_logp - streams.behaviour_logp) * streams.weight
    trained = importance[streams.mask]
    return effective_sample_size(trained) / max(1, len(trained))


def sampler_weight(learned: Batch, sampled: Batch, cap: float) -> Tensor:
    """`mismatch_weights` of rows under the learner's and under the sampler's log-probs: float [B, T].

    1 for cues, which the sampler never drew.
    """
    weight = mismatch_weights(learned.policy_logp, sampled.policy_logp, cap)
    return torch.where(sampled.origin == int(Origin.CUE), 1.0, weight)


def make_samples(rows: Sequence[Row], batch: Batch, streams: Streams, advantages: Tensor) -> list[Sample]:
    """One Sample a row, streams cut to its own length. advantages: float [B]."""
    segment = segments(batch)
    plain = bool((streams.weight == 1).all())
    clipped = not bool(streams.truncated.any())
    samples = []
    for i, row in enumerate(rows):
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
                segment=tuple(segment[i, :n].tolist()),
                policy_logp=row.policy_logp,
                source=row.source,
            )
        )
    return samples
