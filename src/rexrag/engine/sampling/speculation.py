"""Drafts of what a row says next, so that one forward runs several of its tokens.

A forward of one token a row takes nearly as long as one of a few, and much of what a search agent writes was
to be expected: tags, phrases, names from its evidence. Drafted tokens run along with a sampled one. Which
token comes at a place is a function of the row's random number and the model's distribution there
(`draw.py`), so a draft decides nothing: where it was right its place is run already, else what it wrote is
dropped. This is speculative decoding (Leviathan, Kalman & Matias 2023) with n-grams of the session's own rows
as the draft, and gives the same tokens, not only the same distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

ORDER = 3
"""Tokens that a draft looks back at, at most: n − 1 of the n-grams."""
LENGTH = 8
"""Tokens drafted ahead, at most."""
CONFIDENCE = 0.5
"""Least product of their shares among what came after the same tokens before."""


@dataclass(slots=True)
class _Seen:
    """What came after some tokens."""

    total: int = 0
    likeliest: int = -1
    counts: dict[int, int] = field(default_factory=dict)


class Drafts:
    """Counts of which token followed the last one to `ORDER` tokens, over all rows of a session."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, ...], _Seen] = {}

    def learn(self, before: Sequence[int], tokens: Sequence[int]) -> None:
        """`tokens` stood after `before`, of which the last `ORDER` matter."""
        row = [*before[-ORDER:], *tokens]
        for end in range(len(row) - len(tokens), len(row)):
            token = row[end]
            for start in range(max(0, end - ORDER), end):
                key = tuple(row[start:end])
                seen = self._seen.get(key)
                if seen is None:
                    seen = self._seen[key] = _Seen()
                seen.total += 1
                count = seen.counts[token] = seen.counts.get(token, 0) + 1
                if count > seen.counts.get(seen.likeliest, 0):
                    seen.likeliest = token

    def draft(self, before: Sequence[int], most: int) -> list[int]:
        """At most `most` tokens that are likely to follow `before`."""
        row = [*before[-ORDER:]]
        first, sure = len(row), 1.0
        for _ in range(min(most, LENGTH)):
            seen, forgotten = self._after(row)
            # Having seen it once is little evidence, and less the shorter what it came after.
            sure *= seen.counts.get(seen.likeliest, 0) / (seen.total + 0.5 + forgotten)
            if sure < CONFIDENCE:
                break
            row.append(seen.likeliest)
        return row[first:]

    def _after(self, row: Sequence[int]) -> tuple[_Seen, int]:
        """What came after as many of the last `ORDER` tokens as were seen before, and how many were not."""
        past = tuple(row[-ORDER:])
        for forgotten in range(ORDER):
            seen = self._seen.get(past[forgotten:])
            if seen is not None:
                return seen, forgotten
        return _Seen(), ORDER
