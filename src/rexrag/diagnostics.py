"""A step in numbers: what `metrics.jsonl` holds of the rollouts that `step.collect` drew."""

from __future__ import annotations

from collections import defaultdict

from rexrag.step import Collected
from rexrag.types import Origin, Rollout


def describe(step: Collected) -> dict[str, float]:
    """Flat figures by name; rates are fractions in [0, 1], `tokens/…` are counts of this step."""
    base, probes = step.base, step.probes
    kept = [probe for probe, keep in zip(probes, step.kept.tolist(), strict=True) if keep]
    solved_before, solved_after = _solved(base), _solved([*base, *kept])
    groups = max(1, len(solved_before))
    figures = {
        "em/train": _mean([r.em for r in base]),
        "reward/mean": _mean([r.reward for r in base]),
        "searches/mean": _mean([sum(t.action == "search" for t in r.turns) for r in base]),
        "dead_ends/rate": _mean([float(r.answer is not None and r.em < 1.0) for r in base]),
        "dead_ends/unanswered": _mean([float(r.answer is None) for r in base]),
        "groups/all_wrong_before": sum(not any(em) for em in solved_before.values()) / groups,
        "groups/all_wrong_after": sum(not any(em) for em in solved_after.values()) / groups,
        "groups/no_signal": sum(len(set(em)) == 1 for em in solved_after.values()) / groups,
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


def _solved(rollouts: list[Rollout]) -> dict[str, list[float]]:
    groups: dict[str, list[float]] = defaultdict(list)
    for rollout in rollouts:
        groups[rollout.question.group].append(rollout.em)
    return groups


def _mean(values: list[float] | list[int]) -> float:
    return sum(values) / len(values) if values else 0.0
