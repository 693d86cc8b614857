"""BM25 over a corpus in memory or in a memory-mapped index folder (scores by bm25s).

The score of a document d for a query q (Lucene's variant of Robertson's BM25; Kamphuis et al., ECIR 2020):

    Σ_{t in q} log(1 + (N − df_t + 0.5) / (df_t + 0.5)) · tf / (tf + k1·(1 − b + b·|d| / avg |d|))

Words are the same on both sides: case and accents folded, English stop words and possessive 's dropped.
Scripts without spaces between words (Chinese, Japanese, Thai, …) are cut into single characters and pairs of
neighbours, as Lucene's CJK analyser does.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rexrag.errors import ConfigError, DataError
from rexrag.retrieval.base import CorpusRetriever, Hits
from rexrag.retrieval.corpus import documents_digest
from rexrag.retrieval.rankers.bm25s_alone import STOPWORDS_EN, bm25s
from rexrag.types import Document

BLOCK = 256
"""Scores in a block: `best_places` looks at the maximum of each block first, and skips most blocks."""
SPACED, UNSPACED = "fold-en-1", "fold-en-2"
"""Word splitters: UNSPACED also cuts scripts without spaces. A corpus without such a script is split alike by
both, and its index keeps the older name."""
STOP_WORDS = frozenset(STOPWORDS_EN)
# A word; but not the "s" of "Mary's", which would match every other possessive.
_WORD = re.compile(r"(?!(?<=['’])s\b)\w+")
# Thai, Lao, Tibetan, Myanmar, Khmer, kana, and Chinese characters.
_NO_SPACES = (
    "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
_UNSPACED = re.compile(f"[{_NO_SPACES}]")
_PIECES = re.compile(f"[{_NO_SPACES}]+|[^{_NO_SPACES}]+")


@dataclass(frozen=True, slots=True)
class BM25Options:
    """`k1` >= 0: how slowly repeats of a word saturate. `b` in [0, 1]: how much length counts."""

    k1: float = 1.2
    b: float = 0.75
    words: str = SPACED
    """Name of the word splitter; an index made with one that is not known is refused."""

    def __post_init__(self) -> None:
        if not 0 <= self.k1 < float("inf"):
            raise ConfigError(f"k1 is {self.k1}; expected a number of at least 0")
        if not 0 <= self.b <= 1:
            raise ConfigError(f"b is {self.b}; expected a number from 0 to 1")


def split_words(text: str, splitter: str = UNSPACED) -> list[str]:
    """The words that are indexed and searched, in order, repeats kept."""
    if text.isascii():
        return [word for word in _WORD.findall(text.casefold()) if word not in STOP_WORDS]
    # Accents come off before the case is folded: NFKD can bring capitals back.
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    words = [word for word in _WORD.findall(plain.casefold()) if word not in STOP_WORDS]
    if splitter == SPACED or not has_unspaced(text):
        return words
    return [piece for word in words for piece in _pieces(word)]


def has_unspaced(text: str) -> bool:
    """Whether a text is partly in a script that puts no spaces between words."""
    return not text.isascii() and _UNSPACED.search(text) is not None


def _pieces(word: str) -> Iterator[str]:
    """Of a run without spaces each character and each pair of neighbours; other runs are words."""
    for run in _PIECES.findall(word):
        if _UNSPACED.match(run):
            yield from run
            yield from (run[i : i + 2] for i in range(len(run) - 1))
        else:
            yield run


class BM25Ranker:
    """BM25 by bm25s: every score is worked out beforehand, in memory or in mapped files."""

    kind = "bm25"

    def __init__(self, scorer: bm25s.BM25, options: BM25Options) -> None:
        self.scorer = scorer
        self.options = options
        self.vocabulary: Mapping[str, int] = scorer.vocab_dict

    @classmethod
    def build(
        cls, texts: Iterable[str], options: BM25Options, counted: Callable[[int], None] | None = None
    ) -> BM25Ranker:
        """Index texts. `counted` is called with the number of texts that are split so far.

        Only the word numbers of a text are kept in memory. Raises DataError where there is no word at all.
        """
        # Numbers go by first appearance, so that the same corpus gives the same files on every machine.
        vocabulary: dict[str, int] = {}
        ids: list[list[int]] = []
        unspaced = False
        for text in texts:
            unspaced = unspaced or has_unspaced(text)
            ids.append([vocabulary.setdefault(word, len(vocabulary)) for word in split_words(text)])
            if counted is not None:
                counted(len(ids))
        if not vocabulary:
            raise DataError(f"nothing to index: {len(ids)} documents without a word that is no stop word")
        scorer = bm25s.BM25(k1=options.k1, b=options.b, method="lucene", backend="numpy", csc_backend="numpy")
        scorer.index((ids, vocabulary), create_empty_token=False, show_progress=False)
        return cls(scorer, replace(options, words=UNSPACED if unspaced else SPACED))

    @property
    def identity(self) -> Mapping[str, Any]:
        return asdict(self.options)

    def __len__(self) -> int:
        return int(self.scorer.scores["num_docs"])

    def rank(self, queries: Sequence[str], topk: int) -> list[Hits]:
        """Places that share a word with the query, by score, then by place; none for unknown words."""
        return [self._rank(query, topk) for query in queries]

    def _rank(self, query: str, topk: int) -> Hits:
        words = split_words(query, self.options.words)
        known = [self.vocabulary[word] for word in words if word in self.vocabulary]
        if not known:
            return []
        scores: NDArray[np.float32] = self.scorer.get_scores_from_ids(known)
        return [(place, float(scores[place])) for place in best_places(scores, topk)]


class BM25Retriever(CorpusRetriever):
    """BM25 over a corpus in memory. Safe to call from several threads: nothing changes after it is made."""

    @classmethod
    def build(cls, documents: Iterable[Document], options: BM25Options | None = None) -> BM25Retriever:
        """Index documents in memory. Raises DataError where there is no word to index."""
        store = tuple(documents)
        ranker = BM25Ranker.build((document.contents for document in store), options or BM25Options())
        return cls(ranker, store, documents_digest(store))


def best_places(scores: NDArray[np.float32], topk: int) -> list[int]:
    """Places of the `topk` highest positive scores [N], highest first, ties by place."""
    blocks = len(scores) // BLOCK
    border = np.float32(0)
    if blocks >= topk:
        # The k best blocks hold k scores of at least the k-th block's best one, so lower ones cannot matter.
        # Scores equal to the lowest one stay in, so that ties are ordered by place, not by chance.
        # A block is every `blocks`-th place: the maximum over rows is three times as fast as along them.
        best = scores[: blocks * BLOCK].reshape(BLOCK, blocks).max(0)
        border = np.partition(best, blocks - topk)[blocks - topk]
    places = np.flatnonzero(scores >= border if border > 0 else scores > 0)
    order: list[int] = places[np.argsort(-scores[places], kind="stable")[:topk]].tolist()
    return order
