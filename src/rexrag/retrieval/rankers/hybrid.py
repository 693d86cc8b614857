"""Reciprocal rank fusion: several rankings of one corpus become one (Cormack, Clarke & Büttcher, SIGIR 2009).

    score(d) = Σ_rankings 1 / (k + rank of d), ranks from 1, nothing where d is not in a ranking

It needs no scores, so BM25 and cosine similarity can be mixed without scaling either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rexrag.errors import ConfigError, IndexFolderError
from rexrag.retrieval.base import Hits, Ranker


@dataclass(frozen=True, slots=True)
class FusionOptions:
    """`k` > 0 damps the first ranks (60 in the paper). `depth` >= 1: how far each ranking is read."""

    k: int = 60
    depth: int = 100

    def __post_init__(self) -> None:
        if self.k < 1 or self.depth < 1:
            raise ConfigError(f"k is {self.k} and depth is {self.depth}; expected at least 1 each")


def reciprocal_rank_fusion(rankings: Sequence[Hits], k: int = 60) -> Hits:
    """The fused ranking, best first, ties by place."""
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, (place, _) in enumerate(ranking, 1):
            scores[place] = scores.get(place, 0.0) + 1.0 / (k + rank)
    return sorted(scores.items(), key=lambda hit: (-hit[1], hit[0]))


class HybridRanker:
    """Fuses the rankings of several rankers over the same corpus."""

    kind = "hybrid"

    def __init__(self, rankers: Sequence[Ranker], options: FusionOptions) -> None:
        """Raises IndexFolderError where they have not seen the same number of documents."""
        self.rankers, self.options = tuple(rankers), options
        if len({len(ranker) for ranker in self.rankers}) != 1:
            raise IndexFolderError("the parts of a hybrid index disagree on the number of documents")

    def __len__(self) -> int:
        return len(self.rankers[0])

    @property
    def identity(self) -> Mapping[str, Any]:
        return {**asdict(self.options), "parts": {r.kind: dict(r.identity) for r in self.rankers}}

    def rank(self, queries: Sequence[str], topk: int) -> list[Hits]:
        depth = max(topk, self.options.depth)
        each = [ranker.rank(queries, depth) for ranker in self.rankers]
        return [
            reciprocal_rank_fusion(rankings, self.options.k)[:topk] for rankings in zip(*each, strict=True)
        ]
