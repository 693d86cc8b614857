"""BM25 over a corpus in memory or in a memory-mapped index folder (scores by bm25s).

The score of a document d for a query q (Lucene's variant of Robertson's BM25; Kamphuis et al., ECIR 2020):

    Σ_{t in q} log(1 + (N − df_t + 0.5) / (df_t + 0.5)) · tf / (tf + k1·(1 − b + b·|d| / avg |d|))

Words are the same on both sides: case and accents folded, English stop words and possessive 's dropped.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import bm25s
import numpy as np
from bm25s.stopwords import STOPWORDS_EN
from numpy.typing import NDArray

from rexrag.errors import ConfigError, DataError
from rexrag.io import sha256_rows
from rexrag.retrieval.corpus import documents_digest
from rexrag.types import Document

# It sets itself to DEBUG when imported and then reports every index that is built.
logging.getLogger("bm25s").setLevel(logging.WARNING)

STOP_WORDS = frozenset(STOPWORDS_EN)
# A word; but not the "s" of "Mary's", which would match every other possessive.
_WORD = re.compile(r"(?!(?<=['’])s\b)\w+")


@dataclass(frozen=True, slots=True)
class BM25Options:
    """`k1` >= 0: how slowly repeats of a word saturate. `b` in [0, 1]: how much length counts."""

    k1: float = 1.2
    b: float = 0.75
    words: str = "fold-en-1"
    """Name of the word splitter; an index made with another one is refused."""

    def __post_init__(self) -> None:
        if not 0 <= self.k1 < float("inf"):
            raise ConfigError(f"k1 is {self.k1}; expected a number of at least 0")
        if not 0 <= self.b <= 1:
            raise ConfigError(f"b is {self.b}; expected a number from 0 to 1")


class DocumentStore(Protocol):
    """Documents by their place in the corpus: a tuple in memory, or a mapped file."""

    def __len__(self) -> int: ...

    def __getitem__(self, place: int, /) -> Document: ...


def split_words(text: str) -> list[str]:
    """The words that are indexed and searched, in order, repeats kept."""
    if not text.isascii():
        # Accents come off before the case is folded: NFKD can bring capitals back.
        text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return [word for word in _WORD.findall(text.casefold()) if word not in STOP_WORDS]


class BM25Retriever:
    """A `Retriever` by BM25. Safe to call from several threads: nothing is written after it is made."""

    def __init__(
        self, scorer: bm25s.BM25, documents: DocumentStore, options: BM25Options, corpus_digest: str
    ) -> None:
        self.scorer = scorer
        self.documents = documents
        self.options = options
        self.corpus_digest = corpus_digest
        self.vocabulary: Mapping[str, int] = scorer.vocab_dict

    @classmethod
    def build(cls, documents: Iterable[Document], options: BM25Options | None = None) -> BM25Retriever:
        """Index documents in memory. Raises DataError where there is no word to index."""
        options = options or BM25Options()
        store = tuple(documents)
        # Numbers go by first appearance, so that the same corpus gives the same files on every machine.
        vocabulary: dict[str, int] = {}
        ids = [
            [vocabulary.setdefault(word, len(vocabulary)) for word in split_words(document.contents)]
            for document in store
        ]
        if not vocabulary:
            raise DataError(f"nothing to index: {len(store)} documents without a word that is no stop word")
        scorer = bm25s.BM25(k1=options.k1, b=options.b, method="lucene", backend="numpy", csc_backend="numpy")
        scorer.index((ids, vocabulary), create_empty_token=False, show_progress=False)
        return cls(scorer, store, options, documents_digest(store))

    @property
    def digest(self) -> str:
        """Identity of corpus and options."""
        return sha256_rows(["bm25", self.corpus_digest, asdict(self.options)])

    def search(self, queries: Sequence[str], topk: int) -> list[list[Document]]:
        """The best documents of each query, by score, then by their order in the corpus.

        Only documents that share a word with the query are returned: none for stop words or unknown words.
        Raises ConfigError where `topk` < 1.
        """
        if topk < 1:
            raise ConfigError(f"topk is {topk}; expected at least 1")
        return [self._search(query, topk) for query in queries]

    def _search(self, query: str, topk: int) -> list[Document]:
        known = [self.vocabulary[word] for word in split_words(query) if word in self.vocabulary]
        if not known:
            return []
        scores: NDArray[np.float32] = self.scorer.get_scores_from_ids(known)
        found = []
        for place in best_places(scores, topk):
            document = self.documents[place]
            found.append(Document(document.id, document.contents, float(scores[place])))
        return found


def best_places(scores: NDArray[np.float32], topk: int) -> list[int]:
    """Places of the `topk` highest positive scores [N], highest first, ties by place."""
    places = np.flatnonzero(scores > 0)
    kept = scores[places]
    if len(places) > topk:
        # Everything from the k-th score up, so that ties at the border are settled by place, not by chance.
        border = np.partition(kept, len(kept) - topk)[len(kept) - topk]
        places = places[kept >= border]
        kept = scores[places]
    order: list[int] = places[np.argsort(-kept, kind="stable")[:topk]].tolist()
    return order
