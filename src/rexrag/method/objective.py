"""The loss on [B, T] streams: clipped surrogate, KL, aggregation. It has no case for probes.

Every stream is aligned with response tokens. `normalizer` makes micro-batches additive: pass the value of
`aggregation_normalizer` for the whole mini-batch and the losses of its parts sum to the loss of the whole.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from rexrag.errors import MethodError, ShapeError
from rexrag.method.checks import require_finite, require_shape
from rexrag.types import Segment

Aggregation = Literal["token-mean", "sequence-sum"]

LOG_RATIO_BOUND = 20.0
"""Importance ratios lie in [exp(-20), exp(20)]; beyond it the gradient is zero anyway."""


def clipped_surrogate(
    logp: Tensor,
    behaviour_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    *,
    weight: Tensor | None = None,
    truncated: Tensor | None = None,
    truncation_cap: float = 1.0,
    aggregation: Aggregation = "token-mean",
    normalizer: float | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """PPO's clipped surrogate as a loss to minimise; arXiv 1707.06347 Eq. 7, REX-RAG Eq. 8.

    logp, behaviour_logp: float [B, T], natural log; mask: bool [B, T]; advantages: float [B].
    weight: float [B, T], multiplies a token's surrogate; no gradient flows into it.
    truncated: bool [B, T]; such a token is trained with min(truncation_cap, ratio)·log π, the ratio held
    constant (truncated importance sampling) instead of the clipped ratio.
    A token whose log-probs are not finite is dropped and counted in `nonfinite_tokens`. It adds nothing, but
    the mean is still over all of `mask`, so that micro-batches add up whatever they drop.

    Returns a scalar and floats: ratio_mean, clip_share, nonfinite_tokens, tokens.
    Raises ShapeError, NonFiniteError (advantages, weight), MethodError.
    """
    _check(logp, behaviour_logp, advantages, mask, clip_low, clip_high)
    finite = torch.isfinite(logp.detach()) & torch.isfinite(behaviour_logp)
    use = mask & finite
    logp = torch.where(use, logp, 0.0)
    log_ratio = logp - torch.where(use, behaviour_logp, 0.0)
    ratio = torch.exp(log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND))
    advantage = advantages.to(logp.dtype)[:, None]
    unclipped = ratio * advantage
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantage
    surrogate = torch.minimum(unclipped, clipped)
    is_clipped = clipped < unclipped
    if truncated is not None:
        require_shape("truncated", truncated, logp.shape)
        if not truncation_cap > 0.0:
            raise MethodError(f"truncation_cap = {truncation_cap}, expected > 0")
        held = held_surrogate(logp, log_ratio, advantage, truncation_cap)
        surrogate = torch.where(truncated, held, surrogate)
        is_clipped = is_clipped & ~truncated
    if weight is not None:
        require_shape("weight", weight, logp.shape)
        require_finite("weight", torch.where(mask, weight, 0.0))
        surrogate = surrogate * weight.detach().to(logp.dtype)
    loss = -aggregate(torch.where(use, surrogate, 0.0), mask, aggregation, normalizer)
    tokens = int(use.sum())
    return loss, {
        "ratio_mean": float(ratio.detach()[use].mean()) if tokens else math.nan,
        "clip_share": float(is_clipped[use].float().mean()) if tokens else math.nan,
        "nonfinite_tokens": float((mask & ~finite).sum()),
        "tokens": float(tokens),
    }


def held_surrogate(logp: Tensor, log_ratio: Tensor, advantage: Tensor, cap: float) -> Tensor:
    """min(cap, ratio)·A·log π with the ratio held constant: truncated importance sampling (Ionides 2008).

    logp, log_ratio: float [B, T]; advantage: float, broadcastable to them.
    """
    ratio = torch.exp(log_ratio.detach().clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND))
    return ratio.clamp(max=cap) * advantage * logp


def k3_kl(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(π || ref) per token: exp(d) − d − 1 with d = ref − logp; never negative.

    Both float [...], same shape. Bounded by LOG_RATIO_BOUND. Raises ShapeError.
    """
    require_shape("ref_logp", ref_logp, logp.shape)
    difference = (ref_logp - logp).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return torch.expm1(difference) - difference


def kl_penalty(
    logp: Tensor,
    ref_logp: Tensor,
    mask: Tensor,
    aggregation: Aggregation = "token-mean",
    normalizer: float | None = None,
) -> tuple[Tensor, int]:
    """`k3_kl` of the trained tokens [B, T] as a scalar, and how many were dropped as not finite.

    A dropped token adds nothing and counts in the mean, as in `clipped_surrogate`. Raises as `aggregate`.
    """
    finite = torch.isfinite(logp.detach()) & torch.isfinite(ref_logp)
    use = mask & finite
    values = k3_kl(torch.where(use, logp, 0.0), torch.where(use, ref_logp, 0.0))
    return aggregate(values, mask, aggregation, normalizer), int((mask & ~finite).sum())


def aggregation_normalizer(mask: Tensor, aggregation: Aggregation = "token-mean") -> float:
    """What `aggregate` divides by: trained tokens, or rows that have any. Additive over rows.

    Raises MethodError for an unknown aggregation.
    """
    _require_known(aggregation)
    if aggregation == "token-mean":
        return float(mask.sum())
    return float(mask.any(dim=-1).sum())


def aggregate(
    values: Tensor, mask: Tensor, aggregation: Aggregation = "token-mean", normalizer: float | None = None
) -> Tensor:
    """Masked values [B, T] to a scalar; zero where nothing is trained.

    token-mean: mean over all trained tokens. sequence-sum: mean over rows of their token sums (no division
    by a length, Dr. GRPO, arXiv 2503.20783).
    Raises ShapeError, MethodError for an unknown aggregation.
    """
    _require_known(aggregation)
    require_shape("mask", mask, values.shape)
    masked = torch.where(mask, values, 0.0)
    rows = masked.sum(dim=-1)
    divisor = aggregation_normalizer(mask, aggregation) if normalizer is None else normalizer
    return rows.sum() / max(divisor, 1.0)


def ratio_by_label(
    logp: Tensor,
    behaviour_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    label: Tensor,
    clip: tuple[float, float] = (0.2, 0.2),
    truncated: Tensor | None = None,
) -> Tensor:
    """Sums of (tokens, ratio, clipped tokens) per `Segment` of a token: float64 [segments, 3]; additive.

    label: int [B, T], the `Segment` of each token; clip: (low, high); truncated: bool [B, T], tokens that are
    never clipped.
    """
    use = mask & torch.isfinite(logp) & torch.isfinite(behaviour_logp)
    ratio = torch.exp((logp - behaviour_logp)[use].double().clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND))
    sign = advantages.double()[:, None].expand(logp.shape)[use]
    is_clipped = ((sign > 0) & (ratio > 1.0 + clip[1])) | ((sign < 0) & (ratio < 1.0 - clip[0]))
    if truncated is not None:
        is_clipped &= ~truncated[use]
    columns = torch.stack([torch.ones_like(ratio), ratio, is_clipped.double()], dim=-1)
    return torch.zeros(len(Segment), 3, dtype=torch.float64, device=ratio.device).index_add_(
        0, label[use].long(), columns
    )


def _check(
    logp: Tensor, behaviour_logp: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float
) -> None:
    if logp.dim() != 2:
        raise ShapeError(f"logp has shape {tuple(logp.shape)}, expected [B, T]")
    require_shape("behaviour_logp", behaviour_logp, logp.shape)
    require_shape("mask", mask, logp.shape)
    require_shape("advantages", advantages, logp.shape[:1])
    if mask.dtype != torch.bool:
        raise MethodError(f"mask has dtype {mask.dtype}, expected torch.bool")
    if not (0.0 <= low <= 1.0) or not high >= 0.0:
        raise MethodError(f"clip_low = {low}, clip_high = {high}: expected 0 <= low <= 1, high >= 0")
    require_finite("advantages", advantages)


def _require_known(aggregation: str) -> None:
    if aggregation not in get_args(Aggregation):
        raise MethodError(
            f"aggregation = {aggregation!r}, expected one of {', '.join(get_args(Aggregation))}"
        )
