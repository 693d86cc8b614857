"""verl's clipped loss with tokens that are not clipped (`suffix_weight = "unclipped"`).

verl hands a loss no stream of ours but the weight of each token; a negative one marks a token whose ratio is
held constant. Its size is the weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss, compute_policy_loss_vanilla, register_policy_loss

from rexrag.method.objective import held_surrogate
from rexrag.verl.mapping import HELD_LOSS

CAP = 1.0
"""Of the ratio that is held constant."""


@register_policy_loss(HELD_LOSS)  # type: ignore[untyped-decorator, unused-ignore]
def policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """See `verl.trainer.ppo.core_algos.compute_policy_loss_vanilla`; all tensors [B, T]."""
    given = (old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config)
    if rollout_is_weights is None or not bool((rollout_is_weights < 0).any()):
        whole: tuple[Tensor, dict[str, Any]] = compute_policy_loss_vanilla(*given, rollout_is_weights)
        return whole
    held = rollout_is_weights < 0
    clipped, metrics = compute_policy_loss_vanilla(*given, rollout_is_weights.clamp(min=0.0))
    surrogate = held_surrogate(log_prob, log_prob - old_log_prob, advantages, CAP) * rollout_is_weights.abs()
    rest = agg_loss(
        loss_mat=torch.where(held, -surrogate, 0.0),
        loss_mask=response_mask,
        loss_agg_mode=loss_agg_mode,
        **config.global_batch_info,
    )
    return clipped + rest, metrics
