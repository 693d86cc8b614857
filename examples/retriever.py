"""A retriever of your own: the passages that share most words with the query.

python examples/retriever.py
rexrag train --set retriever.kind=plugin --set retriever.plugin=examples.retriever:from_world
"""

from collections.abc import Sequence

import rexrag
from rexrag.data.world.generator import World


class WordOverlap:
    """Ranks documents by the number of words that they share with the query."""

    def __init__(self, documents: Sequence[rexrag.Document]) -> None:
        self.documents = [(document, set(document.contents.lower().split())) for document in documents]
        self.digest = f"word-overlap/{len(documents)}"

    def search(self, queries: Sequence[str], topk: int) -> list[list[rexrag.Document]]:
        """The best `topk` documents of each query."""
        found = []
        for query in queries:
            words = set(query.lower().split())
            ranked = sorted(self.documents, key=lambda entry: -len(words & entry[1]))
            found.append([document for document, _ in ranked[:topk]])
        return found


def from_world() -> WordOverlap:
    """A retriever over the passages of a small embedded world, as `sizes.py` sets it."""
    return WordOverlap(World(0, 24).documents)


if __name__ == "__main__":
    from sizes import SMALL

    run = rexrag.train("quickstart", overrides=[*SMALL, "name=example-retriever"], retriever=from_world())
    print(run.evaluations()[-1]["em"])
