"""Speculative tokens from n-grams, so that one forward runs several tokens of a row.

Speculative decoding (Leviathan, Kalman & Matias 2023) with n-grams of the session's own rows as the draft
model: much of what a search agent writes is predictable (tags, phrases, names from its evidence), and on a
CPU a forward of one token takes nearly as long as one of a few. A draw is a function of the row's random
number and the model's distribution (`token_draw.py`), so the sampled tokens are the same with and without
speculation, not only their distribution. A speculative token that differs from the drawn one is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

ORDER = 3
"""Tokens of context of the longest n-gram: n − 1."""
LENGTH = 8
"""Speculative tokens in one forward of a row, at most."""
CONFIDENCE = 0.5
"""Least estimated probability that all speculative tokens of a row are right."""


@dataclass(slots=True)
class _Successors:
    """Counts of the tokens that followed one context."""

    total: int = 0
    likeliest: int = -1
    counts: dict[int, int] = field(default_factory=dict)


class NGrams:
    """Counts of the token that followed the last 1 to `ORDER` tokens, over all rows of a session."""

    def __init__(self) -> None:
        self._successors: dict[tuple[int, ...], _Successors] = {}

    def learn(self, before: Sequence[int], tokens: Sequence[int]) -> None:
        """Count `tokens`, which followed `before`. Only the last `ORDER` tokens of `before` are used."""
        row = [*before[-ORDER:], *tokens]
        for end in range(len(row) - len(tokens), len(row)):
            token = row[end]
            for start in range(max(0, end - ORDER), end):
                key = tuple(row[start:end])
                seen = self._successors.get(key)
                if seen is None:
                    seen = self._successors[key] = _Successors()
                seen.total += 1
                count = seen.counts[token] = seen.counts.get(token, 0) + 1
                if count > seen.counts.get(seen.likeliest, 0):
                    seen.likeliest = token

    def propose(self, before: Sequence[int], most: int) -> list[int]:
        """At most `most` tokens that are likely to follow `before`."""
        row = [*before[-ORDER:]]
        first, sure = len(row), 1.0
        for _ in range(min(most, LENGTH)):
            seen, unused = self._after(row)
            # A single observation is little evidence, and less for a shorter context.
            sure *= seen.counts.get(seen.likeliest, 0) / (seen.total + 0.5 + unused)
            if sure < CONFIDENCE:
                break
            row.append(seen.likeliest)
        return row[first:]

    def _after(self, row: Sequence[int]) -> tuple[_Successors, int]:
        """Counts after the longest known context, and how many of its `ORDER` tokens were not used."""
        past = tuple(row[-ORDER:])
        for unused in range(ORDER):
            seen = self._successors.get(past[unused:])
            if seen is not None:
                return seen, unused
        return _Successors(), ORDER
