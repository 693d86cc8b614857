"""Reciprocal rank fusion: worked numbers, and what it must not depend on."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rexrag.errors import ConfigError, IndexFolderError
from rexrag.retrieval.base import Hits
from rexrag.retrieval.rankers.hybrid import FusionOptions, HybridRanker, reciprocal_rank_fusion


class Fixed:
    """A ranker that gives one ranking."""

    kind = "fixed"

    def __init__(self, hits: Hits, size: int = 9) -> None:
        self.identity: dict[str, object] = {}
        self.hits, self.size, self.asked = hits, size, []

    def __len__(self) -> int:
        return self.size

    def rank(self, queries, topk):
        self.asked.append(topk)
        return [self.hits[:topk] for _ in queries]


def test_worked_example() -> None:
    fused = reciprocal_rank_fusion([[(7, 9.0), (3, 8.0)], [(3, 0.9), (5, 0.8)]], k=60)
    assert [place for place, _ in fused] == [3, 7, 5]
    assert fused[0][1] == pytest.approx(1 / 62 + 1 / 61)
    assert fused[1][1] == pytest.approx(1 / 61)
    assert fused[2][1] == pytest.approx(1 / 62)


@given(st.lists(st.permutations(range(6)), min_size=1, max_size=4), st.integers(1, 100))
def test_only_ranks_count(rankings: list[list[int]], k: int) -> None:
    some: list[Hits] = [[(p, 1.0 / (i + 1)) for i, p in enumerate(r)] for r in rankings]
    other: list[Hits] = [[(p, 100.0 - i) for i, p in enumerate(r)] for r in rankings]
    assert reciprocal_rank_fusion(some, k) == reciprocal_rank_fusion(other, k)
    # Where all agree, so does the fusion.
    same = reciprocal_rank_fusion([some[0]] * 3, k)
    assert [p for p, _ in same] == rankings[0]


def test_each_ranking_is_read_deeper_than_is_asked() -> None:
    """A passage that is second in both beats one that is first in only one; topk 1 must see it."""
    a, b = Fixed([(1, 3.0), (2, 2.0)]), Fixed([(3, 3.0), (2, 2.0)])
    ranker = HybridRanker([a, b], FusionOptions(depth=10))
    assert [place for place, _ in ranker.rank(["q"], 1)[0]] == [2]
    assert (a.asked, b.asked) == ([10], [10])


def test_parts_of_different_corpora() -> None:
    with pytest.raises(IndexFolderError, match="disagree on the number of documents"):
        HybridRanker([Fixed([], 3), Fixed([], 4)], FusionOptions())
    with pytest.raises(ConfigError):
        FusionOptions(k=0)
