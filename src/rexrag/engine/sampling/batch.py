"""Which rows take part in the next forward, and as which groups."""

from __future__ import annotations

from collections.abc import Iterable

from rexrag.engine.sampling.appending import CachedPlan, Group, append_block, append_few, append_one
from rexrag.engine.sampling.cache import Bank
from rexrag.engine.sampling.rows import EpisodeRow

PREFILL_TOKENS = 8192
"""Prompt, evidence and cue tokens in one forward; a single longer row still goes in one piece."""
BLOCK_VALUES = 1 << 24
"""Values of a layer's copied keys and values, or of a head's scores, in one block of rows; likewise."""


def next_forward(banks: Iterable[Bank[EpisodeRow]]) -> tuple[list[EpisodeRow], CachedPlan]:
    """The rows that append tokens, in packed order, and the attention of these tokens.

    All rows that sample take part; prompts, evidence and cues up to `PREFILL_TOKENS`, the rest later.
    """
    rows: list[EpisodeRow] = []
    groups: list[Group] = []
    blocks: list[tuple[Bank[EpisodeRow], list[EpisodeRow]]] = []
    for bank in banks:
        active = [row for row in bank.rows if row.pending and not row.waiting]
        short = [row for row in active if len(row.pending) == 1 + len(row.speculative)]
        if short:
            counts = [len(row.pending) for row in short]
            start = sum(len(row.pending) for row in rows)
            one = max(counts) == 1
            groups.append(append_one(bank, short, start) if one else append_few(bank, short, counts, start))
            rows += short
        long = [row for row in active if len(row.pending) > 1 + len(row.speculative)]
        blocks += ((bank, part) for part in _blocks(long, bank))
    start = first = sum(len(row.pending) for row in rows)
    for bank, part in blocks:
        counts = [len(row.pending) for row in part]
        if start > first and start + sum(counts) - first > PREFILL_TOKENS:
            break
        groups.append(append_block(bank, part, counts, start))
        rows += part
        start += sum(counts)
    return rows, CachedPlan(groups)


def _blocks(rows: list[EpisodeRow], bank: Bank[EpisodeRow]) -> list[list[EpisodeRow]]:
    """Rows of a bank that append several tokens, split so that padding at most doubles a row."""
    parts: list[list[EpisodeRow]] = []
    room = 0
    for row in sorted(rows, key=lambda row: -len(row.pending)):
        widest = len(parts[-1][0].pending) if parts else 0
        if not room or widest > 2 * len(row.pending):
            parts.append([])
            widest = len(row.pending)
            values = bank.capacity * max(widest, 2 * bank.shape.heads * bank.shape.size)
            room = max(1, min(BLOCK_VALUES // values, PREFILL_TOKENS // widest))
        parts[-1].append(row)
        room -= 1
    return parts
