"""Weights of rollouts (multiple importance sampling) and of tokens (sampler mismatch)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rexrag.errors import FailureRateError, MethodError
from rexrag.method.checks import require_alpha, require_failure_rate, require_finite, require_shape


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
    """w = 1/((1−α) + α·r): multiple importance sampling over whole rollouts [METHOD §3].

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


def mismatch_weights(learner_logp: Tensor, sampler_logp: Tensor, cap: float) -> Tensor:
    """min(cap, π_learner/π_sampler) per token: corrects the sampler's rounding, apart from the mixture.

    Both float [...]. Truncated importance sampling (Ionides 2008). Raises ShapeError.
    """
    require_shape("sampler_logp", sampler_logp, learner_logp.shape)
    return torch.exp((learner_logp - sampler_logp).clamp(max=math.log(cap)))


def effective_sample_size(weights: Tensor) -> float:
    """Kish's (Σw)² / Σw² of importance weights [B]: how many equal-weight rollouts these are worth."""
    total = float(weights.double().sum())
    return total * total / float(weights.double().square().sum()) if total > 0 else 0.0
