"""Rows of (prompt, response) packed for one forward without a cache or padding; shared prefixes run once.

The rows of a pack form a prefix tree: rollouts of a question share its prompt, and often half of their
responses. Every token sees exactly the tokens before it in its own row.

Shape suffixes: N packed tokens, U scored pairs, M response tokens of all rows of a pack.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from rexrag.engine.attention import PackedPlan, PrefixNode, hidden_states, token_logps

TokenRow = tuple[Sequence[int], Sequence[int]]
"""(prompt, response) token ids."""


@dataclass(frozen=True, slots=True)
class Pack:
    """One forward. `rows` are indices of the packed rows, in the order of their response tokens.

    The last response token of a row is not run: nothing follows it.
    """

    rows: list[int]
    ids: list[int]
    positions: list[int]
    nodes: list[PrefixNode]
    source: list[int]
    """[U] index of the packed token whose hidden state predicts each scored token."""
    targets: list[int]
    """[U] ids of the scored tokens; a token that several rows share is scored once."""
    place: list[int]
    """[M] index in `targets` of each response token, row after row."""

    def logps(self, model: nn.Module, temperature: float) -> Tensor:
        """float32 [M] natural log-probs of the response tokens, with gradient where it is enabled."""
        device = next(model.parameters()).device
        ids, positions, source, targets, place = (
            torch.tensor(x, dtype=torch.long, device=device)
            for x in (self.ids, self.positions, self.source, self.targets, self.place)
        )
        hidden = hidden_states(model, ids, positions, PackedPlan(self.nodes))
        head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
        return token_logps(head, hidden[source], targets, temperature)[place]


def pack_rows(rows: Sequence[TokenRow], indices: Sequence[int], max_tokens: int) -> Iterator[Pack]:
    """Packs of at most `max_tokens` tokens (a longer row goes alone) that cover `indices` once.

    Rows with a common prefix are neighbours. Rows without a response are left out.
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
    """Length of the common prefix of two rows, which are known to agree on the first `start` tokens."""
    end = min(len(one), len(other))
    return next((i for i in range(start, end) if one[i] != other[i]), end)


def pack(rows: Sequence[TokenRow], trees: Sequence[Sequence[int]]) -> Pack:
    """One pack. `trees`: groups of row indices, each sorted by tokens; prefixes are shared in a group."""
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
    """Add the nodes of the prefix tree of `fed`; returns for each row the packed tokens it consists of."""
    paths: dict[int, list[int]] = {index: [] for index in fed}
    todo: list[tuple[list[int], int, int | None]] = [(list(fed), 0, None)]
    while todo:
        members, start, parent = todo.pop()  # these rows agree up to `start`, where `parent` ends
        first = fed[members[0]]
        end = shared(first, fed[members[-1]], start)  # rows are sorted: all share what first and last share
        if end > start:
            node, parent = PrefixNode(end - start, parent), len(made.nodes)
            made.nodes.append(node)
            run = range(len(made.ids), len(made.ids) + node.size)
            made.ids.extend(first[start:end])
            made.positions.extend(range(start, end))
            for index in members:
                paths[index].extend(run)
        going = [index for index in members if len(fed[index]) > end]
        todo += [([*part], end, parent) for _, part in groupby(going, key=lambda i: fed[i][end])]
    return paths
