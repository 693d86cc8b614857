"""Every way in which probing could have written a rollout, for multiple importance sampling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rexrag.method.checks import require_finite, require_shape
from rexrag.types import Origin


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
    failure_rate: z, float [B]; last_cut: the latest position at which probing could have cut, int [B] (−1:
    nowhere). A match is a pool cue standing word for word among POLICY or CUE tokens, at or before last_cut
    and with a token behind it (a probe goes on after its cue); −inf without one. P(fail|o′) is taken as 1.
    Duplicate cues are counted once: their trie share holds the mass. Raises ShapeError, NonFiniteError.
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
