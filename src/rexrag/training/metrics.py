"""A step in numbers: what `metrics.jsonl` holds of the rollouts that `step.collect` drew."""

from __future__ import annotations

from collections import defaultdict

import torch

from rexrag.config.schema import Config
from rexrag.engine.base import Learner, Policy
from rexrag.method.objective import k3_kl
from rexrag.training.step import Collected
from rexrag.types import Origin, Rollout, searches_run


def describe(step: Collected) -> dict[str, float]:
    """Flat figures by name; rates are fractions in [0, 1], `tokens/…` are counts of this step."""
    base, probes = step.base, step.probes
    kept = [probe for probe, keep in zip(probes, step.kept.tolist(), strict=True) if keep]
    rows = [*base, *kept]
    solved_before = _by_group(base, step.groups[: len(base)], "em")
    solved_after, rewards = _by_group(rows, step.groups, "em"), _by_group(rows, step.groups, "reward")
    groups = max(1, len(solved_before))
    figures = {
        "em/train": _mean([r.em for r in base]),
        "reward/mean": _mean([r.reward for r in base]),
        "searches/mean": _mean([searches_run(r.turns, r.forced_last_turn) for r in base]),
        "dead_ends/rate": _mean([float(r.answer is not None and r.em < 1.0) for r in base]),
        "dead_ends/unanswered": _mean([float(r.answer is None) for r in base]),
        "groups/all_wrong_before": sum(not any(em) for em in solved_before.values()) / groups,
        "groups/all_wrong_after": sum(not any(em) for em in solved_after.values()) / groups,
        "groups/no_signal": sum(len(set(r)) == 1 for r in rewards.values()) / groups,
        "probes/drawn": float(len(probes)),
        "probes/right": sum(p.em for p in probes),
        "probes/kept": float(len(kept)),
        "probes/kept_right": sum(p.em for p in kept),
        "alpha": step.streams.alpha,
        "failure_rate": step.streams.failure_rate,
        "ess": step.streams.ess,
        "rows": float(len(step.rows)),
    }
    for origin in Origin:
        count = sum(r.count(origin) for r in base)
        # A probe's prefix was written by its parent.
        count += sum(p.origins[p.cut or 0 :].count(int(origin)) for p in probes)
        figures[f"tokens/{origin.name.lower()}"] = float(count)
    figures |= {f"time/{phase}": seconds for phase, seconds in step.seconds.items()}
    return figures


def diagnose(step: Collected, learner: Learner, start: Policy, config: Config) -> dict[str, float]:
    """What the update that follows will be made of, and how far the policy has come from its start.

    `gradient/<segment>`: its share of the sum of the segments' gradient norms. `kl_to_start`: k3 estimate of
    KL(π_old ‖ π_start) in nats a token, over the POLICY tokens of the base rollouts (which π_old sampled).
    """
    method, temperature = config.method, config.agent.temperature
    norms = learner.gradient_norms(step.samples, method, temperature)
    total = sum(norms.values()) or 1.0
    rows = step.base
    starts = start.score([(rollout.prompt, rollout.tokens) for rollout in rows], temperature)
    now = torch.cat([torch.tensor(rollout.logps) for rollout in rows])
    own = torch.cat([torch.tensor(rollout.origins) == int(Origin.POLICY) for rollout in rows])
    kl = k3_kl(now[own], torch.cat(starts)[own])
    return {f"gradient/{name}": norm / total for name, norm in norms.items()} | {
        "kl_to_start": float(kl.mean()) if len(kl) else 0.0
    }


def _by_group(rollouts: list[Rollout], group_of: list[int], figure: str) -> dict[int, list[float]]:
    groups: dict[int, list[float]] = defaultdict(list)
    for rollout, group in zip(rollouts, group_of, strict=True):
        groups[group].append(getattr(rollout, figure))
    return groups


def _mean(values: list[float] | list[int]) -> float:
    return sum(values) / len(values) if values else 0.0
