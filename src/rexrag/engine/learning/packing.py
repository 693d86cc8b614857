"""Rows of (prompt, response) packed for one forward without a cache: no padding, and each beginning once.

Rows of a pack that begin alike are run once up to where they part: a question's rollouts share its prompt,
and often half of their responses. Every token sees what it would see in its own row, so nothing else changes.

Shape suffixes: N packed tokens, U scored pairs, M response tokens of all rows of a pack.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from rexrag.engine.attention import PackedPlan, Segment, hidden_states, token_logps

TokenRow = tuple[Sequence[int], Sequence[int]]
"""(prompt, response) token ids."""


@dataclass(frozen=True, slots=True)
class Pack:
    """One forward. `rows` are indices of the packed rows, in the order of their response tokens.

    The last response token is never fed: nothing follows it.
    """

    rows: list[int]
    ids: list[int]
    positions: list[int]
    segments: list[Segment]
    source: list[int]
    """[U] the packed token whose hidden state predicts each scored one."""
    targets: list[int]
    """[U] the scored tokens: each once, however many rows say it there."""
    place: list[int]
    """[M] where the response tokens, row after row, are among the scored ones."""

    def logps(self, model: nn.Module, temperature: float) -> Tensor:
        """float32 [M] natural log-probs of the response tokens, with gradient where it is enabled."""
        device = next(model.parameters()).device
        ids, positions, source, targets, place = (
            torch.tensor(x, dtype=torch.long, device=device)
            for x in (self.ids, self.positions, self.source, self.targets, self.place)
        )
        hidden = hidden_states(model, ids, positions, PackedPlan(self.segments))
        head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
        return token_logps(head, hidden[source], targets, temperature)[place]


def pack_rows(rows: Sequence[TokenRow], indices: Sequence[int], max_tokens: int) -> Iterator[Pack]:
    """Packs of at most `max_tokens` tokens (a longer row goes alone) that cover `indices` once.

    Rows that begin alike stand together. Rows without a response, which have nothing to score, are left out.
    """
    fed = {i: (*rows[i][0], *rows[i][1][:-1]) for i in indices if len(rows[i][1])}
    batch: list[int] = []
    tokens = 0
    for index in sorted(fed, key=lambda i: fed[i]):
        own = len(fed[index]) - (shared(fed[batch[-1]], fed[index]) if batch else 0)
        if batch and tokens + own > max_tokens:
            yield pack(rows, [batch])
            batch, tokens, own = [], 0, len(fed[index])
        batch.append(index)
        tokens += own
    if batch:
        yield pack(rows, [batch])


def shared(one: Sequence[int], other: Sequence[int], start: int = 0) -> int:
    """How many first tokens two rows have in common, which agree on the first `start`."""
    end = min(len(one), len(other))
    return next((i for i in range(start, end) if one[i] != other[i]), end)


def pack(rows: Sequence[TokenRow], trees: Sequence[Sequence[int]]) -> Pack:
    """One pack. `trees`: indices of rows, sorted by their tokens, which share what they begin with."""
    made = Pack([], [], [], [], [], [], [])
    for tree in trees:
        fed = {i: (*rows[i][0], *rows[i][1][:-1]) for i in tree}
        paths = _grow(made, fed)
        scored: dict[tuple[int, int], int] = {}
        for index in tree:
            prompt, response = rows[index]
            made.rows.append(index)
            for pair in zip(paths[index][len(prompt) - 1 :], response, strict=True):
                if pair not in scored:
                    scored[pair] = len(made.targets)
                    made.source.append(pair[0])
                    made.targets.append(pair[1])
                made.place.append(scored[pair])
    return made


def _grow(made: Pack, fed: dict[int, tuple[int, ...]]) -> dict[int, list[int]]:
    """Add the segments of rows; for each row, which packed tokens it consists of."""
    paths: dict[int, list[int]] = {index: [] for index in fed}
    todo: list[tuple[list[int], int, int | None]] = [(list(fed), 0, None)]
    while todo:
        members, start, context = todo.pop()  # rows that agree up to `start`, which `context` and above hold
        first = fed[members[0]]
        end = shared(first, fed[members[-1]], start)  # sorted: what these two share, all do
        if end > start:
            segment, context = Segment(end - start, context), len(made.segments)
            made.segments.append(segment)
            run = range(len(made.ids), len(made.ids) + segment.size)
            made.ids.extend(first[start:end])
            made.positions.extend(range(start, end))
            for index in members:
                paths[index].extend(run)
        going = [index for index in members if len(fed[index]) > end]
        todo += [([*part], end, context) for _, part in groupby(going, key=lambda i: fed[i][end])]
    return paths
