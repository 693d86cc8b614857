"""Packed rows: each prefix once, and the gradients of rows apart."""

from __future__ import annotations

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st

from rexrag.engine.learning.packing import pack_rows
from tests.engine.learning.test_learner import distance, gradients, learner, near_policy, samples


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from([(1,), (1, 1), (1, 2, 3), (8,) * 11]), st.lists(st.integers(1, 2), max_size=7)
        ),
        max_size=20,
    ),
    max_tokens=st.integers(1, 60),
)
def test_packs_cover_every_row_once_within_the_limit(rows, max_tokens):
    packs = list(pack_rows(rows, range(len(rows)), max_tokens))
    assert sorted(i for p in packs for i in p.rows) == [i for i, (_, r) in enumerate(rows) if r]
    for pack in packs:
        assert len(pack.ids) <= max_tokens or len(pack.rows) == 1
        assert sum(node.size for node in pack.nodes) == len(pack.ids)
        fed = [(*rows[i][0], *rows[i][1][:-1]) for i in pack.rows]
        # Each beginning is run once, and what a token sees is its own row up to itself.
        assert seen(pack) == sorted({row[:end] for row in fed for end in range(1, len(row) + 1)})
        said = [(fed[n][: len(rows[i][0]) + t], token) for n, i in enumerate(pack.rows)
                for t, token in enumerate(rows[i][1])]  # fmt: skip
        before = [beginnings(pack)[source] for source in pack.source]
        assert [(before[u], pack.targets[u]) for u in pack.place] == said
        assert len(pack.source) == len(pack.targets) == len(set(said))


def beginnings(pack) -> list[tuple[int, ...]]:
    """For each packed token: what it sees, itself included, by the positions that the pack gives."""
    out: list[tuple[int, ...]] = []
    ends: list[tuple[int, ...]] = []
    for node in pack.nodes:
        before = () if node.parent is None else ends[node.parent]
        for token in pack.ids[len(out) : len(out) + node.size]:
            assert pack.positions[len(out)] == len(before)
            before = (*before, token)
            out.append(before)
        ends.append(before)
    return out


def seen(pack) -> list[tuple[int, ...]]:
    return sorted(beginnings(pack))


def test_rows_that_share_beginnings_have_the_gradients_of_rows_apart(monkeypatch):
    """A tree of rows, each with weights, advantage and mask of its own, against one row a pack."""
    trainer = learner()
    trunk = [list(range(3, 20)), list(range(20, 31)), [], [5, 6]]
    made = [
        [*trunk[0], *([*trunk[1], 9] if n % 2 else []), *trunk[n % 4], n + 1, *range(40, 40 + n)]
        for n in range(8)
    ]
    rows = [
        dataclasses.replace(
            row, prompt=(1, 2, 3 + n % 2), tokens=tuple(tokens), advantage=0.5 + 0.25 * n * (-1) ** n,
            mask=tuple((n + t) % 5 > 0 for t in range(len(tokens))),
            weight=tuple(1.0 + 0.1 * ((n + t) % 3) for t in range(len(tokens))), truncated=(),
            segment=(0,) * len(tokens),
        )
        for n, (tokens, row) in enumerate(zip(made, samples(), strict=False))
    ]  # fmt: skip
    rows = near_policy(trainer.model, rows)
    together, _ = gradients(trainer, rows)
    tokens = [(row.prompt, row.tokens) for row in rows]
    (pack,) = pack_rows(tokens, range(len(rows)), 10**6)
    assert 2 * len(pack.ids) < sum(len(p) + len(r) for p, r in tokens)

    def apart(rows, indices, max_tokens):
        for index in indices:
            yield from pack_rows(rows, [index], max_tokens)

    monkeypatch.setattr("rexrag.engine.learning.learner.pack_rows", apart)
    alone, _ = gradients(trainer, rows)
    assert distance(together, alone) < 1e-5
