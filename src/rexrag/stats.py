"""Uncertainty of a mean over questions or seeds: bootstrap intervals, paired tests; area under a curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

RESAMPLES = 4000
ROUNDING = 1e-12
"""Differences of this size are those of floating-point arithmetic."""
MEMORY = 10**7
"""Numbers resampled at once: a large set is resampled in parts, with the same result for a small one."""


def interval(values: Sequence[float], seed: int = 0) -> dict[str, float]:
    """{value, low, high, n}: a mean with its 95 % bootstrap interval (BCa, Efron 1987).

    Two values or fewer, and equal values, have no spread to resample: low and high are the value itself.
    """
    data = np.asarray(values, dtype=np.float64)
    if not len(data):
        return {"value": 0.0, "low": 0.0, "high": 0.0, "n": 0}
    mean = float(data.mean())
    if len(data) < 3 or np.ptp(data) <= ROUNDING * max(1.0, abs(mean)):
        return {"value": mean, "low": mean, "high": mean, "n": len(data)}
    bounds = stats.bootstrap(
        (data,), np.mean, n_resamples=RESAMPLES, batch=_batch(len(data), RESAMPLES), vectorized=True,
        rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return {"value": mean, "low": float(bounds.low), "high": float(bounds.high), "n": len(data)}


def share(k: int, n: int) -> dict[str, float]:
    """{value, low, high, n}: k of n with its 95 % Wilson interval (Wilson 1927); of nothing, 0 in [0, 1]."""
    if not n:
        return {"value": 0.0, "low": 0.0, "high": 1.0, "n": 0}
    bounds = stats.binomtest(k, n).proportion_ci(0.95, "wilson")
    return {"value": k / n, "low": float(bounds.low), "high": float(bounds.high), "n": n}


def score_interval(values: Sequence[float]) -> dict[str, float]:
    """`interval` of scores in [0, 1]; Wilson's where all are 0 or all are 1.

    Eight wrong answers of eight have no spread to resample, and yet do not prove that the rate is 0.
    """
    if len(values) and (not any(values) or all(value == 1.0 for value in values)):
        return share(round(sum(values)), len(values))
    return interval(values)


def macro_interval(groups: Sequence[Sequence[float]], seed: int = 0) -> dict[str, float]:
    """{value, low, high, n}: the mean of the groups' means, each group resampled within itself (percentiles).

    `n` counts groups. A group without values is refused (ValueError): its mean does not exist.
    """
    if not groups:
        return {"value": 0.0, "low": 0.0, "high": 0.0, "n": 0}
    if not all(len(group) for group in groups):
        raise ValueError("a macro average needs at least one value in every group")
    rng = np.random.default_rng(seed)
    total = np.zeros(RESAMPLES)
    for group in groups:
        data = np.asarray(group, dtype=np.float64)
        size = _batch(len(data), RESAMPLES)
        for start in range(0, RESAMPLES, size):
            stop = min(start + size, RESAMPLES)
            drawn = rng.integers(0, len(data), (stop - start, len(data)))
            total[start:stop] += data[drawn].mean(axis=1)
    low, high = np.percentile(total / len(groups), [2.5, 97.5])
    value = float(np.mean([np.mean(group) for group in groups]))
    return {"value": value, "low": float(low), "high": float(high), "n": len(groups)}


def sampled_error(strata: Sequence[tuple[Sequence[float], int]]) -> float:
    """Standard error of the mean of a stratified sample: (values drawn, size) for each stratum.

    sqrt(sum of W² (1 - n/N) s²/n) with W = N over the size of all: 0 where everything was drawn, the ordinary
    standard error with finite-population correction where there is one stratum (Cochran 1977, §5.3). A
    stratum of which only one value was drawn takes the variance of all values.
    """
    whole = sum(size for _, size in strata)
    pooled = np.concatenate([np.asarray(values, dtype=np.float64) for values, _ in strata] or [np.zeros(0)])
    if len(pooled) < 2:
        return 0.0
    error = 0.0
    for values, size in strata:
        n = len(values)
        if n:
            variance = float(np.var(values if n > 1 else pooled, ddof=1))
            error += (size / whole) ** 2 * (1 - n / size) * variance / n
    return float(np.sqrt(error))


def paired_p(differences: Sequence[float]) -> float:
    """Two-sided p-value of "no difference" by flipping signs of pairs; exact for few pairs (Fisher 1935)."""
    data = np.asarray(differences, dtype=np.float64)
    if len(data) < 2 or not data.any():
        return 1.0

    def mean(x: Any, axis: int) -> Any:
        return np.mean(x, axis=axis)

    test = stats.permutation_test(
        (data,), mean, permutation_type="samples", n_resamples=20_000, vectorized=True,
        batch=_batch(len(data), 20_000),
        rng=np.random.default_rng(0),
    )  # fmt: skip
    return float(test.pvalue)


def difference(pairs: Sequence[float]) -> dict[str, float]:
    """{value, low, high, n, p} of paired differences: `interval` and `paired_p`."""
    return interval(pairs) | {"p": paired_p(pairs)}


def differs(difference: Mapping[str, float]) -> bool:
    """Is it significantly different from 0? Its interval excludes 0, and p, where given, is at most .05.

    Both, because the bootstrap is too narrow for few values: of normal noise, .27, .16 and .10 of the
    intervals of 3, 5 and 10 values leave 0 out (some 2,000 draws each); with p too it is 0, 0 and .07 (400).
    """
    excluded = difference["low"] > 0 or difference["high"] < 0
    return excluded and difference.get("p", 0.0) <= 0.05


def area(spent: Sequence[float], values: Sequence[float], budget: float) -> float:
    """Mean value over the budget: area under the curve through (spent, value), divided by the budget.

    The curve is cut at the budget (a run ends with the step that crosses it) and flat after its last point.
    """
    x, y = np.asarray(spent, dtype=np.float64), np.asarray(values, dtype=np.float64)
    inside = x < budget
    x_cut = np.append(x[inside], budget)
    y_cut = np.append(y[inside], np.interp(budget, x, y))
    return float(np.trapezoid(y_cut, x_cut) / budget)


def _batch(values: int, resamples: int) -> int:
    return max(1, min(resamples, MEMORY // max(1, values)))
