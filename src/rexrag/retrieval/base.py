"""What the agent needs of a retriever."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rexrag.types import Document


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
