"""A step in numbers: what `metrics.jsonl` holds of the rollouts that `step.collect` drew."""

from __future__ import annotations

import torch

from rexrag.config.schema import Config
from rexrag.engine.base import Learner, Policy
from rexrag.method.objective import k3_kl
from rexrag.types import Origin, StepBatch, searches_run


def describe(batch: StepBatch) -> dict[str, float]:
    """Flat figures by name; rates are fractions in [0, 1], `tokens/…` are counts of this step."""
    base, groups, statistics = batch.rollouts, batch.groups, batch.statistics
    probes = batch.probes
    kept = [probe for probe in probes if probe.kept]
    count = max(1, len(groups))
    figures = {
        "em/train": _mean([r.em for r in base]),
        "reward/mean": _mean([r.reward for r in base]),
        "searches/mean": _mean([searches_run(r.turns, r.forced_last_turn) for r in base]),
        "dead_ends/rate": _mean([float(r.answer is not None and not r.correct) for r in base]),
        "dead_ends/unanswered": _mean([float(r.answer is None) for r in base]),
        "groups/all_wrong_before": sum(not any(r.correct for r in g.rollouts) for g in groups) / count,
        "groups/all_wrong_after": sum(not any(r.correct for r in g.trained) for g in groups) / count,
        "groups/no_signal": sum(not group.has_signal for group in groups) / count,
        "probes/drawn": float(len(probes)),
        "probes/right": float(sum(probe.rollout.correct for probe in probes)),
        "probes/kept": float(len(kept)),
        "probes/kept_right": float(sum(probe.rollout.correct for probe in kept)),
        "alpha": statistics.alpha,
        "failure_rate": statistics.failure_rate,
        "ess": statistics.ess,
        "rows": float(len(base) + len(kept)),
    }
    for origin in Origin:
        written = sum(r.count(origin) for r in base)
        # A probe's prefix was written by its parent.
        written += sum(p.rollout.origins[p.cut :].count(int(origin)) for p in probes)
        figures[f"tokens/{origin.name.lower()}"] = float(written)
    return figures | {f"time/{phase}": seconds for phase, seconds in statistics.seconds.items()}


def diagnose(batch: StepBatch, learner: Learner, start: Policy, config: Config) -> dict[str, float]:
    """What the update that follows will be made of, and how far the policy has come from its start.

    `gradient/<segment>`: its share of the sum of the segments' gradient norms. `kl_to_start`: k3 estimate of
    KL(π_old ‖ π_start) in nats a token, over the POLICY tokens of the base rollouts (which π_old sampled).
    """
    algorithm, temperature = config.algorithm, config.agent.temperature
    norms = learner.gradient_norms(batch.samples, algorithm, temperature)
    total = sum(norms.values()) or 1.0
    rows = batch.rollouts
    starts = start.score([(rollout.prompt, rollout.tokens) for rollout in rows], temperature)
    now = torch.cat([torch.tensor(rollout.logps) for rollout in rows])
    own = torch.cat([torch.tensor(rollout.origins) == int(Origin.POLICY) for rollout in rows])
    kl = k3_kl(now[own], torch.cat(starts)[own])
    return {f"gradient/{name}": norm / total for name, norm in norms.items()} | {
        "kl_to_start": float(kl.mean()) if len(kl) else 0.0
    }


def _mean(values: list[float] | list[int]) -> float:
    return sum(values) / len(values) if values else 0.0
