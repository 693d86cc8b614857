"""Whole numbers in proportion to weights."""

from __future__ import annotations

from collections.abc import Sequence


def apportion(n: int, weights: Sequence[float]) -> list[int]:
    """`n` split in proportion to `weights`, by largest remainder; of equal remainders the first."""
    total = sum(weights)
    exact = [n * weight / total for weight in weights]
    counts = [int(value) for value in exact]
    for i in sorted(range(len(counts)), key=lambda i: counts[i] - exact[i])[: n - sum(counts)]:
        counts[i] += 1
    return counts
