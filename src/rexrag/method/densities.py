"""Policy correction: densities of a batch drawn from the mixture μ = (1−α)·π_old + α·π_ε.

Three ways to divide by the right density [METHOD §3]:

    paper        per token: log μ_t = logaddexp(log(1−α) + log π_old,t, log α + log μ_ε,t); ratio π_θ/μ
    trajectory   per rollout: one frozen weight 1/((1−α) + α·r), r = probing's density over π_old's
    internalize  the cue leaves no trace in the training row (`samples.splice`), so nothing is mixed

All densities are natural logs. `mixture_densities` is the batched form; it works only on the probes' rows,
since for a base rollout the mixture is a constant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from rexrag.errors import AlphaError, CutError, FailureRateError, MethodError, ShapeError
from rexrag.method.checks import require_alpha, require_failure_rate, require_finite, require_shape
from rexrag.types import Origin

FAILURE_RATE_FLOOR = 1e-3
"""z is clamped to [1e-3, 1]: probes can exist without a failure when a judge, not the answer, calls it."""

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
        cue_logp[None],
        torch.tensor([cue_logp.shape[0]], device=policy_logp.device),
        failure_rate,
        kind,
        pool_size,
    )[0]


def probe_log_densities(
    policy_logp: Tensor,
    origin: Tensor,
    cut: Tensor,
    cue_logp: Tensor,
    cue_length: Tensor,
    failure_rate: float | Tensor,
    kind: CueDensity = "fine",
    pool_size: int | None = None,
) -> Tensor:
    """`probe_log_density` of K probes at once: float [K, T].

    policy_logp: float [K, T]; origin: int [K, T]; cut, cue_length: int [K]; cue_logp: float [K, m], padded
    on the right; failure_rate: z, a float or float [K]. Raises as `probe_log_density`.
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
    return torch.where(
        is_cue, _cue_density(position - start, cue_logp, kind, pool_size).to(density.dtype), density
    )


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


def probe_log_ratio(cue_policy_logp: Tensor, cue_logp: Tensor, failure_rate: float) -> float:
    """log r of one explanation (cut, cue) of a rollout: log[P(fail|o′)·q(h) / (z·Π_cue π_old)].

    cue_policy_logp, cue_logp: float [m]. failure_rate: z > 0, or z / P(fail|o′) where that is known (the
    quotient may exceed 1); P(fail|o′) is taken as 1 otherwise.
    A rollout with several explanations has the logsumexp of theirs. Raises as `trajectory_weight`.
    """
    require_shape("cue_logp", cue_logp, cue_policy_logp.shape)
    require_failure_rate(failure_rate, at_most=math.inf)
    require_finite("cue_policy_logp", cue_policy_logp)
    require_finite("cue_logp", cue_logp)
    return float(cue_logp.double().sum() - cue_policy_logp.double().sum()) - math.log(failure_rate)


def trajectory_weight(
    cue_policy_logp: Tensor | None, cue_logp: Tensor | None, failure_rate: float, alpha: float
) -> float:
    """w = 1/((1−α) + α·r): multiple importance sampling over whole rollouts [METHOD §3, `trajectory`].

    cue_policy_logp: log π_old of the cue tokens, float [m]; cue_logp: their trie log-shares, float [m];
    both None for a base rollout (r = 0, w = 1/(1−α)).

    Raises ShapeError, FailureRateError, AlphaError, NonFiniteError, MethodError (only one of the two given).
    """
    require_alpha(alpha)
    if cue_policy_logp is None or cue_logp is None:
        if not failure_rate >= 0.0:
            raise FailureRateError(f"failure_rate = {failure_rate}, expected z >= 0")
        if cue_policy_logp is not cue_logp:
            raise MethodError("cue_policy_logp and cue_logp: expected both or neither")
        log_r = -math.inf
    else:
        log_r = probe_log_ratio(cue_policy_logp, cue_logp, failure_rate)
    return float(trajectory_weights(torch.tensor([log_r], dtype=torch.float64), alpha)[0])


def trajectory_weights(log_r: Tensor, alpha: float | Tensor) -> Tensor:
    """`trajectory_weight` of B rollouts from their log r (−inf for a base rollout): float64 [B]."""
    require_alpha(alpha)
    require_finite("log_r", log_r, allow_minus_infinity=True)
    share = torch.as_tensor(alpha, dtype=torch.float64, device=log_r.device)
    return torch.exp(
        -torch.logaddexp(torch.log1p(-share).expand(log_r.shape), torch.log(share) + log_r.double())
    )


def explanation_log_ratios(
    tokens: Tensor,
    policy_logp: Tensor,
    origin: Tensor,
    cues: Sequence[tuple[int, ...]],
    cue_logp: Tensor,
    failure_rate: Tensor,
    last_cut: Tensor,
) -> Tensor:
    """log r of each rollout, summed over every (cut, cue) that could have written it: float64 [B].

    tokens, origin: int [B, T]; policy_logp: float [B, T]; cue_logp: `CueTrie.table()`, float64 [pool, m];
    failure_rate: z, float [B]; last_cut: `dead_ends.last_cut`, int [B]. A match is a pool cue standing word
    for word among POLICY or CUE tokens, at or before last_cut and with a token behind it (a probe goes on
    after its cue); −inf without one. P(fail|o′) is taken as 1. Duplicate cues are counted once: their trie
    share holds the mass. Raises ShapeError, NonFiniteError.
    """
    require_shape("policy_logp", policy_logp, tokens.shape)
    require_shape("origin", origin, tokens.shape)
    require_shape("last_cut", last_cut, tokens.shape[:1])
    ours = (origin == int(Origin.POLICY)) | (origin == int(Origin.CUE))
    spoken = torch.where(ours, tokens, -1)
    logp = torch.where(ours, policy_logp.double(), 0.0)
    require_finite("policy_logp", logp)
    written = (origin >= 0).sum(1)
    log_r = torch.full((tokens.shape[0],), -torch.inf, dtype=torch.float64, device=tokens.device)
    for index, cue in enumerate(cues):
        if cue in cues[:index] or len(cue) > tokens.shape[1]:
            continue
        window = torch.tensor(cue, device=tokens.device)
        stands = (spoken.unfold(1, len(cue), 1) == window).all(-1)
        at = torch.arange(stands.shape[1], device=tokens.device)[None, :]
        possible = (at <= last_cut[:, None]) & (at + len(cue) < written[:, None])
        row, start = (stands & possible).nonzero(as_tuple=True)
        if len(row):
            spoken_logp = logp.unfold(1, len(cue), 1)[row, start].sum(-1)
            explained = cue_logp[index].sum() - spoken_logp - failure_rate.double()[row].log()
            for r, value in zip(row.tolist(), explained, strict=True):
                log_r[r] = torch.logaddexp(log_r[r], value)
    return log_r


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
            "positive advantage would be clipped at once; lower method.keep_ratio, raise method.clip_high, "
            "or set method.allow_large_alpha = true"
        )


def mismatch_weights(learner_logp: Tensor, sampler_logp: Tensor, cap: float) -> Tensor:
    """min(cap, π_learner/π_sampler) per token: the sampler's numerics, corrected apart from the mixture.

    Both float [...]. Truncated importance sampling (Ionides 2008). Raises ShapeError.
    """
    require_shape("sampler_logp", sampler_logp, learner_logp.shape)
    return torch.exp((learner_logp - sampler_logp).clamp(max=math.log(cap)))


def effective_sample_size(weights: Tensor) -> float:
    """Kish's (Σw)² / Σw² of importance weights [B]: how many equal-weight rollouts these are worth."""
    total = float(weights.double().sum())
    return total * total / float(weights.double().square().sum()) if total > 0 else 0.0


def _cue_density(offset: Tensor, cue_logp: Tensor, kind: CueDensity, pool_size: int | None) -> Tensor:
    if kind == "coarse":
        if pool_size is None or pool_size < 1:
            raise MethodError(f"pool_size = {pool_size}, kind 'coarse' expects the number of cues")
        return torch.zeros_like(offset, dtype=cue_logp.dtype).masked_fill(offset == 0, -math.log(pool_size))
    if kind != "fine":
        raise MethodError(f"kind = {kind!r}, expected 'fine' or 'coarse'")
    if cue_logp.shape[1] == 0:
        return torch.zeros_like(offset, dtype=cue_logp.dtype)
    return cue_logp.gather(1, offset.clamp(0, cue_logp.shape[1] - 1))


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
