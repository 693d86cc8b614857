"""Context distillation (arXiv 2209.15189): a probe is trained without its cue.

The row is o′ without its closing `</think>`, then o″, so that the thought continues without the cue. There is
no mixture: ratios divide by π_old. `suffix_weight` decides how o″ is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rexrag.config.algorithms import RexRagDistill
from rexrag.errors import CutError
from rexrag.method.corrections.base import base_rows, kept_probes, on_policy, trained_tokens
from rexrag.method.rows import Batch, Row, Streams, row_of
from rexrag.types import Probe, RolloutGroup


@dataclass(frozen=True, slots=True)
class ContextDistillation:
    algorithm: RexRagDistill

    def rows(self, groups: Sequence[RolloutGroup]) -> list[Row]:
        own_density = self.algorithm.suffix_weight != "truncated-is"
        probes = [replace(splice(p, i), score_suffix=own_density) for p, i in kept_probes(groups)]
        return [*base_rows(groups), *probes]

    def streams(self, batch: Batch) -> Streams:
        """GRPO's streams; unless `suffix_weight` is "clipped", o″ is trained with min(1, ratio)·log π."""
        plain = on_policy(batch, trained_tokens(batch, self.algorithm.prefix_loss == "all"))
        if self.algorithm.suffix_weight == "clipped":
            return plain
        suffix = batch.is_probe[:, None] & (batch.position >= batch.cut[:, None])
        return replace(plain, truncated=suffix)


def splice(probe: Probe, group: int) -> Row:
    """The row of a probe without its cue; its cut is where o″ begins.

    The policy_logp of o″ is log π_old(o″|q, o′, h): it was sampled after the cue. Raises CutError.
    """
    rollout, parent = probe.rollout, probe.parent
    if not 0 <= probe.cut <= len(rollout.tokens):
        raise CutError(f"cut = {probe.cut}: outside a probe of {len(rollout.tokens)} tokens")
    last = parent.turns[-1] if parent.turns else None
    thought_end = last.thought_end if last is not None else None
    end = probe.cut if thought_end is None else min(thought_end, probe.cut)
    suffix = probe.cut + probe.cue_length
    return replace(
        row_of(rollout, group),
        tokens=rollout.tokens[:end] + rollout.tokens[suffix:],
        origins=rollout.origins[:end] + rollout.origins[suffix:],
        policy_logp=rollout.logps[:end] + rollout.logps[suffix:],
        cut=end,
    )
