"""Rows of (prompt, response) packed for one forward without a cache: no padding, each shared prompt once.

Shape suffixes: N packed tokens, M response tokens of all rows of a pack.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rexrag.engine.local.attention import PackedPlan, Segment, hidden_states, token_logps

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
    """[M] the packed token whose hidden state predicts each response token."""
    targets: list[int]
    """[M] the response tokens, row after row."""

    def logps(self, model: nn.Module, temperature: float) -> Tensor:
        """float32 [M] natural log-probs of the response tokens, with gradient where it is enabled."""
        device = next(model.parameters()).device
        ids, positions, source, targets = (
            torch.tensor(x, dtype=torch.long, device=device)
            for x in (self.ids, self.positions, self.source, self.targets)
        )
        hidden = hidden_states(model, ids, positions, PackedPlan(self.segments))
        head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
        return token_logps(head, hidden[source], targets, temperature)


def pack_rows(rows: Sequence[TokenRow], indices: Sequence[int], max_tokens: int) -> Iterator[Pack]:
    """Packs of at most `max_tokens` tokens (a longer row goes alone) that cover `indices` once.

    Rows with the same prompt stand together, so that it is run once a pack. Rows without a response, which
    have nothing to score, are left out.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for index in indices:
        prompt, response = rows[index]
        if len(response):
            groups.setdefault(tuple(prompt), []).append(index)
    batch: list[tuple[tuple[int, ...], list[int]]] = []
    tokens = 0
    for prompt, members in groups.items():
        for number, index in enumerate(members):
            own = len(rows[index][1]) - 1
            first = number == 0
            if batch and tokens + own + first * len(prompt) > max_tokens:
                yield _pack(rows, batch)
                batch, tokens, first = [], 0, True
            if first:
                batch.append((prompt, []))
                tokens += len(prompt)
            batch[-1][1].append(index)
            tokens += own
    if batch:
        yield _pack(rows, batch)


def _pack(rows: Sequence[TokenRow], batch: Sequence[tuple[tuple[int, ...], list[int]]]) -> Pack:
    pack = Pack([], [], [], [], [], [])
    for prompt, members in batch:
        start = len(pack.ids)
        end = start + len(prompt)
        pack.ids.extend(prompt)
        pack.positions.extend(range(len(prompt)))
        shared = len(pack.segments)
        if len(members) > 1:
            pack.segments.append(Segment(len(prompt)))
        for index in members:
            response = rows[index][1]
            first = len(pack.ids)
            pack.ids.extend(response[:-1])
            last = len(pack.ids)
            pack.positions.extend(range(len(prompt), len(prompt) + last - first))
            if len(members) == 1:  # a prompt of its own: one causal row, without a mask
                pack.segments.append(Segment(last - start))
            elif last > first:
                pack.segments.append(Segment(last - first, context=shared))
            pack.rows.append(index)
            pack.source.extend([end - 1, *range(first, last)])
            pack.targets.extend(response)
    return pack
