"""Densities of a batch drawn from the mixture μ = (1−α)·π_old + α·π_ε, and the shares they depend on.

All are natural logs. `mixture_densities` is the batched form; it works only on the probes' rows, since for a
base rollout the mixture is a constant.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from rexrag.errors import AlphaError, CutError, MethodError, ShapeError
from rexrag.method.checks import require_alpha, require_failure_rate, require_finite, require_shape
from rexrag.types import Origin

FAILURE_RATE_FLOOR = 1e-3
"""z is clamped to [1e-3, 1]: with a dead-end judge there can be probes although every rollout is correct."""

CueDensity = Literal["fine", "coarse"]


def probe_log_density(
    policy_logp: Tensor,
    origin: Tensor,
    cut: int,
    cue_logp: Tensor,
    failure_rate: float,
    kind: CueDensity = "fine",
    pool_size: int | None = None,
) -> Tensor:
    """log μ_ε of each token of one probe: float [T]; REX-RAG Eq. 5.

    policy_logp: log π_old, float [T]; origin: int(Origin.X), int [T]; cut: index of the first cue token;
    cue_logp: `CueTrie.log_prob` of its cue, float [m]; failure_rate: z in (0, 1].

    o′ (POLICY tokens before the cut): log π_old − log(z)/|o′|, |o′| counting POLICY tokens.
    cue: `fine` the trie's next-token log-shares; `coarse` −log(pool_size) on its first token, 0 on the rest.
    o″ and everything inserted by the environment: log π_old.

    Raises ShapeError, CutError, FailureRateError, NonFiniteError, MethodError (coarse without pool_size).
    """
    if policy_logp.dim() != 1:
        raise ShapeError(f"policy_logp has shape {tuple(policy_logp.shape)}, expected [T]")
    if cue_logp.dim() != 1:
        raise ShapeError(f"cue_logp has shape {tuple(cue_logp.shape)}, expected [m]")
    require_shape("origin", origin, policy_logp.shape)
    return probe_log_densities(
        policy_logp[None],
        origin[None],
        torch.tensor([cut], device=policy_logp.device),
        cue_density(cue_logp[None], kind, pool_size),
        torch.tensor([cue_logp.shape[0]], device=policy_logp.device),
        failure_rate,
    )[0]


def cue_density(cue_logp: Tensor, kind: CueDensity = "fine", pool_size: int | None = None) -> Tensor:
    """Log-density of each token of a cue: float [K, m] from the trie's log-shares, float [K, m].

    `fine`: the log-shares. `coarse`: −log(pool_size) on the first token, 0 on the rest.
    Raises MethodError (coarse without pool_size, unknown kind).
    """
    if kind == "fine":
        return cue_logp
    if kind != "coarse":
        raise MethodError(f"kind = {kind!r}, expected 'fine' or 'coarse'")
    if pool_size is None or pool_size < 1:
        raise MethodError(f"pool_size = {pool_size}, kind 'coarse' expects the number of cues")
    first = torch.arange(cue_logp.shape[1], device=cue_logp.device) == 0
    return torch.zeros_like(cue_logp).masked_fill(first, -math.log(pool_size))


def probe_log_densities(
    policy_logp: Tensor,
    origin: Tensor,
    cut: Tensor,
    cue_logp: Tensor,
    cue_length: Tensor,
    failure_rate: float | Tensor,
) -> Tensor:
    """`probe_log_density` of K probes at once: float [K, T].

    policy_logp: float [K, T]; origin: int [K, T]; cut, cue_length: int [K]; cue_logp: `cue_density` of the
    cues, float [K, m], padded on the right; failure_rate: z, a float or float [K]. Raises as
    `probe_log_density`.
    """
    rows, length = _check_probes(policy_logp, origin, cut, cue_logp, cue_length)
    require_failure_rate(failure_rate)
    require_finite("policy_logp", torch.where(origin <= int(Origin.CUE), policy_logp, 0.0))
    position = torch.arange(length, device=policy_logp.device)[None, :]
    start = cut[:, None]
    is_prefix = (position < start) & (origin == int(Origin.POLICY))
    is_cue = (position >= start) & (position < start + cue_length[:, None])
    log_z = torch.as_tensor(failure_rate, dtype=torch.float64, device=policy_logp.device).log()
    # With an empty o′ there is no token to carry z; the density is then 1/z times too small.
    per_token = log_z.expand(rows) / is_prefix.sum(dim=1).clamp(min=1)
    density = policy_logp - (is_prefix * per_token[:, None]).to(policy_logp.dtype)
    of_cue = torch.zeros_like(density)
    if cue_logp.shape[1]:
        offset = (position - start).clamp(0, cue_logp.shape[1] - 1)
        of_cue = cue_logp.gather(1, offset).to(density.dtype)
    return torch.where(is_cue, of_cue, density)


def mixture_log_density(policy_logp: Tensor, probe_logp: Tensor, alpha: float | Tensor) -> Tensor:
    """log μ_t = logaddexp(log(1−α) + log π_old,t, log α + log μ_ε,t), the balance heuristic per token.

    policy_logp, probe_logp: float [...], same shape; −inf in probe_logp means "no probe writes this", as for
    every base rollout. alpha: a float or a tensor that broadcasts, in [0, 1). alpha = 0 returns policy_logp.
    Source: REX-RAG Eq. 6; Veach & Guibas 1995 for the balance heuristic.

    Raises ShapeError, AlphaError, NonFiniteError.
    """
    require_shape("probe_logp", probe_logp, policy_logp.shape)
    require_alpha(alpha)
    require_finite("policy_logp", policy_logp)
    require_finite("probe_logp", probe_logp, allow_minus_infinity=True)
    # float32 rounds a share near 1 to 1, whose log(1−α) is −inf.
    share = torch.as_tensor(alpha, dtype=torch.float64, device=policy_logp.device)
    ours, probes = (log.to(policy_logp.dtype) for log in (torch.log1p(-share), torch.log(share)))
    return torch.logaddexp(ours + policy_logp, probes + probe_logp)


def mixture_densities(
    policy_logp: Tensor, probe_rows: Tensor, probe_logp: Tensor, alpha: float | Tensor
) -> Tensor:
    """`mixture_log_density` of a whole batch [B, T] of which only `probe_rows` (int [K]) are probes.

    probe_logp: float [K, T]; alpha: a float or float [B] (per group). Base rows get log(1−α) + log π_old,
    which is what the mixture is where a probe's density is zero.
    """
    require_alpha(alpha)
    share = torch.as_tensor(alpha, dtype=torch.float64, device=policy_logp.device).expand(
        policy_logp.shape[0]
    )
    mixed = policy_logp + torch.log1p(-share).to(policy_logp.dtype)[:, None]
    if probe_rows.numel():
        rows = policy_logp[probe_rows].double()
        mixture = mixture_log_density(rows, probe_logp.double(), share[probe_rows][:, None])
        mixed[probe_rows] = mixture.to(mixed.dtype)
    return mixed


def failure_rates(correct: Tensor, groups: Tensor, per: Literal["batch", "question"] = "batch") -> Tensor:
    """z = 1 − accuracy of base rollouts, of the batch or of each rollout's own question: float64 [B].

    correct: bool or float [B] (1 = right); groups: int [B]. Clamped to [FAILURE_RATE_FLOOR, 1].
    """
    require_shape("groups", groups, correct.shape)
    wrong = 1.0 - correct.double()
    if per == "batch":
        z = wrong.mean().expand(wrong.shape) if len(wrong) else wrong
    else:
        _, index = torch.unique(groups, return_inverse=True)
        count = torch.bincount(index).double()
        z = (torch.zeros_like(count).index_add_(0, index, wrong) / count)[index]
    return z.clamp(FAILURE_RATE_FLOOR, 1.0)


def mixture_shares(is_probe: Tensor, groups: Tensor, per: Literal["batch", "group"] = "batch") -> Tensor:
    """α = kept probes / all kept rollouts, over the batch or over each rollout's group: float64 [B]."""
    require_shape("groups", groups, is_probe.shape)
    probe = is_probe.double()
    if per == "batch":
        return probe.mean().expand(probe.shape) if len(probe) else probe
    _, index = torch.unique(groups, return_inverse=True)
    count = torch.bincount(index).double()
    return (torch.zeros_like(count).index_add_(0, index, probe) / count)[index]


def guard_alpha(alpha: Tensor, clip_high: float, allow: bool = False) -> None:
    """Refuse a mixture whose base ratios, 1/(1−α), start above 1 + clip_high [METHOD §3, guard].

    Then every base token with a positive advantage is clipped before the first update. Raises AlphaError.
    """
    limit = clip_high / (1.0 + clip_high)
    largest = float(alpha.max()) if alpha.numel() else 0.0
    if largest > limit + 1e-9 and not allow:
        raise AlphaError(
            f"alpha = {largest:.4f} is above clip_high/(1+clip_high) = {limit:.4f}: every base token with a "
            "positive advantage would be clipped at once; lower algorithm.keep_ratio, raise "
            "algorithm.clip_high, or set algorithm.allow_large_alpha = true"
        )


def _check_probes(
    policy_logp: Tensor, origin: Tensor, cut: Tensor, cue_logp: Tensor, cue_length: Tensor
) -> tuple[int, int]:
    if policy_logp.dim() != 2:
        raise ShapeError(f"policy_logp has shape {tuple(policy_logp.shape)}, expected [K, T]")
    rows, length = policy_logp.shape
    require_shape("origin", origin, (rows, length))
    require_shape("cut", cut, (rows,))
    require_shape("cue_length", cue_length, (rows,))
    if cue_logp.dim() != 2 or cue_logp.shape[0] != rows:
        raise ShapeError(f"cue_logp has shape {tuple(cue_logp.shape)}, expected [{rows}, m]")
    require_finite("cue_logp", cue_logp)
    outside = (cut < 0) | (cut + cue_length > length)
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        raise CutError(
            f"cut = {int(cut[row])} and a cue of {int(cue_length[row])} tokens: outside a rollout of {length}"
        )
    position = torch.arange(length, device=origin.device)[None, :]
    inside = (position >= cut[:, None]) & (position < (cut + cue_length)[:, None])
    misplaced = inside & (origin != int(Origin.CUE))
    if bool(misplaced.any()):
        row, token = (int(i) for i in misplaced.nonzero()[0])
        raise CutError(
            f"cut = {int(cut[row])}: origin[{token}] is {int(origin[row, token])}, expected Origin.CUE there"
        )
    spans = (origin == int(Origin.CUE)).sum(dim=1)
    for row in (spans != cue_length).nonzero()[:, 0].tolist():
        raise ShapeError(
            f"cue_length[{row}] = {int(cue_length[row])}, but row {row} of origin has "
            f"{int(spans[row])} CUE tokens"
        )
    if rows and int(cue_length.max()) > cue_logp.shape[1]:
        raise ShapeError(
            f"cue_logp has {cue_logp.shape[1]} columns, cue_length goes to {int(cue_length.max())}"
        )
    return rows, length
