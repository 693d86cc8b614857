"""Uncertainty of a mean over questions or seeds: bootstrap intervals, paired tests; area under a curve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

RESAMPLES = 4000


def interval(values: Sequence[float], seed: int = 0) -> dict[str, float]:
    """{value, low, high, n}: a mean with its 95 % bootstrap interval (BCa, Efron 1987).

    Two values or fewer, and equal values, have no spread to resample: low and high are the value itself.
    """
    data = np.asarray(values, dtype=np.float64)
    if not len(data):
        return {"value": 0.0, "low": 0.0, "high": 0.0, "n": 0}
    mean = float(data.mean())
    if len(data) < 3 or np.ptp(data) == 0.0:
        return {"value": mean, "low": mean, "high": mean, "n": len(data)}
    bounds = stats.bootstrap(
        (data,), np.mean, n_resamples=RESAMPLES, vectorized=True, rng=np.random.default_rng(seed)
    ).confidence_interval
    return {"value": mean, "low": float(bounds.low), "high": float(bounds.high), "n": len(data)}


def share(k: int, n: int) -> dict[str, float]:
    """{value, low, high, n}: k of n with its 95 % Wilson interval (Wilson 1927); of nothing, 0 in [0, 1]."""
    if not n:
        return {"value": 0.0, "low": 0.0, "high": 1.0, "n": 0}
    bounds = stats.binomtest(k, n).proportion_ci(0.95, "wilson")
    return {"value": k / n, "low": float(bounds.low), "high": float(bounds.high), "n": n}


def paired_p(differences: Sequence[float]) -> float:
    """Two-sided p-value of "no difference" by flipping signs of pairs; exact for few pairs (Fisher 1935)."""
    data = np.asarray(differences, dtype=np.float64)
    if len(data) < 2 or not data.any():
        return 1.0

    def mean(x: Any, axis: int) -> Any:
        return np.mean(x, axis=axis)

    test = stats.permutation_test(
        (data,), mean, permutation_type="samples", n_resamples=20_000, vectorized=True,
        rng=np.random.default_rng(0),
    )  # fmt: skip
    return float(test.pvalue)


def area(spent: Sequence[float], values: Sequence[float], budget: float) -> float:
    """Mean value over the budget: area under the curve through (spent, value), divided by the budget.

    The curve is cut at the budget (a run ends with the step that crosses it) and flat after its last point.
    """
    x, y = np.asarray(spent, dtype=np.float64), np.asarray(values, dtype=np.float64)
    inside = x < budget
    x_cut = np.append(x[inside], budget)
    y_cut = np.append(y[inside], np.interp(budget, x, y))
    return float(np.trapezoid(y_cut, x_cut) / budget)
