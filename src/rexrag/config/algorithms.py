"""The algorithms: one model each, with only the settings that it has.

    [algorithm]
    name = "rex-rag-distill"
    probe_probability = 0.5

A new algorithm is a class here and a member of `Algorithm`; a new correction is a file in
`method/corrections/`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rexrag.types import DeadEnd

Unit = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]


class Shared(BaseModel):
    """What every algorithm has: the group, the advantage and the loss."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    rollouts: Count = 5
    """N, base rollouts a question."""
    dynamic_sampling: Annotated[int, Field(ge=0)] = 0
    """Draw up to this many more batches of questions, until `train.questions` groups have a signal, and train
    on those groups only (DAPO, arXiv 2503.14476 §3.2). 0: train on every group."""
    advantage_scale: Literal["std", "none"] = "std"
    """Divide advantages by the group's standard deviation, or not (Dr. GRPO, arXiv 2503.20783)."""
    advantage_baseline: Literal["mean", "leave-one-out"] = "mean"
    """Subtract the group's mean reward, or the mean of the other rollouts (RLOO, arXiv 2402.14740)."""
    clip_low: Unit = 0.2
    """PPO's clip: a ratio below 1 - clip_low gets no gradient where the advantage is negative."""
    clip_high: Positive = 0.2
    """PPO's clip: a ratio above 1 + clip_high gets no gradient where the advantage is positive."""
    aggregation: Literal["token-mean", "sequence-sum"] = "token-mean"
    """Mean over all trained tokens, or mean over rows of their token sums."""
    kl: NonNegative = 0.0
    """Weight of the k3 KL to the initial policy in the loss; the paper uses 0.001."""
    mismatch_cap: NonNegative = 0.0
    """Cap of the weight (learner probability / sampler probability) that corrects the sampler's rounding.
    0: no weight; the sampler's log-probs are taken for the learner's."""


class Grpo(Shared):
    """GRPO (arXiv 2402.03300): no probes."""

    name: Literal["grpo"] = "grpo"


class Dapo(Shared):
    """DAPO (arXiv 2503.14476): clip-higher, dynamic sampling, token mean, no KL; no probes."""

    name: Literal["dapo"] = "dapo"
    clip_high: Positive = 0.28
    dynamic_sampling: Annotated[int, Field(ge=0)] = 3


class DrGrpo(Shared):
    """Dr. GRPO (arXiv 2503.20783): no standard deviation in advantages, no length in the loss; no probes."""

    name: Literal["dr-grpo"] = "dr-grpo"
    advantage_scale: Literal["std", "none"] = "none"
    aggregation: Literal["token-mean", "sequence-sum"] = "sequence-sum"


class Probing(Shared):
    """What algorithms that probe dead ends have in common (METHOD §2)."""

    probe_probability: Unit = 0.2
    """p, the chance that a dead end is probed."""
    probe_target: Unit = 0.0
    """Above 0: while a smaller share of recent probes is right, p falls in proportion, down to p/8."""
    probe_groups: Literal["all", "all-wrong"] = "all"
    """Probe the dead ends of every group, or only of groups without a right rollout."""
    dead_ends: Literal["judge"] | tuple[DeadEnd, ...] = (DeadEnd.WRONG,)
    """Which rollouts are dead ends: `["wrong"]` (answered, not correct), `["wrong", "unanswered"]`, or
    `"judge"`: those to which `dead_end_judge` gives a probability above one half."""
    dead_end_judge: str = ""
    """Plug-in of `dead_ends = "judge"`: "my_package.module:function", (rollouts, context) -> P(dead end)."""
    filter: Literal["cue-logp", "none", "right"] = "cue-logp"
    """Which probes are kept: those whose cue has the highest mean log-prob, all, or right ones only."""
    keep_ratio: Unit = 0.08
    """ρ, kept probes per base rollout at most."""
    keep_per_group: Annotated[int, Field(ge=0)] = 0
    """Kept probes of one question at most; 0 is no limit."""

    @model_validator(mode="after")
    def _judge_is_named(self) -> Any:
        if (self.dead_ends == "judge") != bool(self.dead_end_judge):
            raise ValueError('dead_ends = "judge" and dead_end_judge go together: set both or neither')
        return self


class RexRag(Probing):
    """REX-RAG as published (arXiv 2508.08149): per-token mixture density, probes kept by their cue."""

    name: Literal["rex-rag"] = "rex-rag"
    correction: Literal["mixture", "none"] = "mixture"
    """Divide by the mixture of policy and probes, or by the policy alone (ablation "w/o IS")."""
    cue_density: Literal["fine", "coarse"] = "fine"
    """Density of a cue's tokens. fine: the token's share in the pool's prefix tree. coarse: 1 / (pool size)
    for the first token, 1 for the rest."""
    cue_loss: Literal["all", "first", "none"] = "all"
    """Which cue tokens are trained: all, the opening that all cues share, or none."""
    prefix_loss: Literal["all", "none"] = "all"
    """In a probe's row, train the tokens before its cut too, or not."""
    alpha: Literal["batch", "group"] = "batch"
    """Share of probes in the mixture, over the batch or for each group."""
    failure_rate: Literal["batch", "question"] = "batch"
    """z, the share of wrong base rollouts, over the batch or for each question."""
    allow_large_alpha: bool = False
    """Allow an alpha so large that every base token with a positive advantage is clipped at once."""


class RexRagDistill(Probing):
    """Probe only groups without a right rollout, keep right probes, train them without the cue.

    The correction is context distillation (arXiv 2209.15189).
    """

    name: Literal["rex-rag-distill"] = "rex-rag-distill"
    probe_probability: Unit = 0.5
    probe_target: Unit = 0.2
    probe_groups: Literal["all", "all-wrong"] = "all-wrong"
    filter: Literal["cue-logp", "none", "right"] = "right"
    keep_ratio: Unit = 0.2
    keep_per_group: Annotated[int, Field(ge=0)] = 1
    prefix_loss: Literal["all", "none"] = "all"
    """In a probe's row, train the tokens before its cut too, or not."""
    suffix_weight: Literal["clipped", "truncated-is", "unclipped"] = "unclipped"
    """Objective of the tokens after the cue. clipped: PPO's clipped ratio, as for other tokens. truncated-is:
    log π weighted by the ratio to their density after the cue, at most 1. unclipped: the same with their
    density without the cue."""

    @model_validator(mode="after")
    def _one_weight_for_one_token(self) -> Any:
        if self.mismatch_cap and self.suffix_weight == "truncated-is":
            raise ValueError("mismatch_cap and suffix_weight 'truncated-is' correct the same tokens twice")
        return self


Algorithm = Annotated[Grpo | Dapo | DrGrpo | RexRag | RexRagDistill, Field(discriminator="name")]
"""The `[algorithm]` table."""
ALGORITHMS: dict[str, type[Shared]] = {
    kind.model_fields["name"].default: kind for kind in get_args(get_args(Algorithm)[0])
}
"""Name -> model."""
DEFAULT_ALGORITHM = "rex-rag-distill"
"""The algorithm of a configuration that names none; docs/results.md says why."""
