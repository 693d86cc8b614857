"""What the agent needs of a retriever, and what a retriever over a stored corpus is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rexrag.errors import ConfigError
from rexrag.io import sha256_rows
from rexrag.types import Document

Hits = list[tuple[int, float]]
"""(place in the corpus, score), best first."""


class Retriever(Protocol):
    """Answers a batch of queries, best document first.

    Fewer than `topk` documents come back only where fewer exist that match. A failed search raises
    `RetrievalError`; it never becomes an empty result.
    """

    @property
    def digest(self) -> str:
        """Identity of corpus and options, for the run folder."""
        ...

    def search(self, queries: Sequence[str], topk: int) -> list[list[Document]]: ...


class Ranker(Protocol):
    """Orders the places of a corpus by how well they answer a query. Safe to call from several threads."""

    kind: str

    def __len__(self) -> int:
        """How many documents it has seen."""
        ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """Options that change what is found, as JSON."""
        ...

    def rank(self, queries: Sequence[str], topk: int) -> list[Hits]: ...


class DocumentStore(Protocol):
    """Documents by their place in the corpus: a tuple in memory, or a mapped file."""

    def __len__(self) -> int: ...

    def __getitem__(self, place: int, /) -> Document: ...


class CorpusRetriever:
    """A `Retriever` made of a ranker and the documents that it ranks."""

    def __init__(self, ranker: Ranker, documents: DocumentStore, corpus_digest: str) -> None:
        self.ranker = ranker
        self.documents = documents
        self.corpus_digest = corpus_digest
        self.digest = sha256_rows([ranker.kind, corpus_digest, dict(ranker.identity)])

    def search(self, queries: Sequence[str], topk: int) -> list[list[Document]]:
        """The best documents of each query. Raises ConfigError where `topk` < 1."""
        if topk < 1:
            raise ConfigError(f"topk is {topk}; expected at least 1")
        return [
            [self._document(place, score) for place, score in hits]
            for hits in self.ranker.rank(queries, topk)
        ]

    def _document(self, place: int, score: float) -> Document:
        document = self.documents[place]
        return Document(document.id, document.contents, score)
