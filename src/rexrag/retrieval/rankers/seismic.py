"""BM25 whose search leaves out most of the corpus, by Seismic (Bruch et al., SIGIR 2024).

BM25 is the product of two sparse vectors with a value for each word, the formula of `bm25` split in two:

    passage: tf / (tf + k1·(1 − b + b·|d| / avg |d|))      query: tf · log(1 + (N − df + 0.5) / (df + 0.5))

For each word the passages with the highest values are kept, in blocks of similar passages with a summary
each. A search reads the lists of the query's heaviest words and skips blocks whose summary scores too low.
The passages of the other blocks get their full score, in half precision. Some of the best passages are
missed (`benchmarks/retrieve.py` measures the recall). The index is read into memory, not mapped.
"""

from __future__ import annotations

import json
import os
import random
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rexrag.errors import ConfigError, DataError, IndexFolderError
from rexrag.io import write_json
from rexrag.retrieval.base import Hits
from rexrag.retrieval.rankers.bm25 import BM25Options, split_words

try:
    import seismic
except ImportError:
    raise ConfigError("bm25-fast needs an extra: pip install -e '.[fast]'") from None

VECTORS, WORDS, WEIGHTS = "fast", "fast.words.json", "fast.weights.npy"
"""Seismic's file (it adds `.index.seismic`), the words, what each counts in a query (float32 [V])."""
TIES = 2
"""Further hits that are asked for, so that ties at the last place are ordered by place in the corpus."""
CHUNK = 10_000
"""Passages handed to Seismic at once."""
SAMPLES, SAMPLED_WORDS, SAMPLED_TOP = 64, 5, 10
"""Queries on which a build measures its recall, words of a passage each; best passages that it looks for."""
SMALL_VOCABULARY = 1 << 16
"""Up to so many words a number takes two bytes."""
Asked = tuple[int, list[int], list[float]]
"""A query's number, its words, and what each of them counts."""


@dataclass(frozen=True, slots=True)
class FastOptions:
    """Recall against memory and time; Seismic's own names in brackets. All are above 0."""

    kept: int = 1500
    """Passages in a word's list: those in which it weighs most [n_postings]."""
    blocks: float = 0.006
    """Blocks of similar passages, as a share of the passages in a list [centroid_fraction]."""
    summary: float = 0.1
    """Share of its weight that the summary of a block holds [summary_energy]."""
    followed: int = 5
    """Words of a query whose lists are searched, heaviest first; others only count in scores [query_cut]."""
    promise: float = 0.7
    """A block is scored where its summary reaches this share of the k-th best score so far [heap_factor]."""


class SeismicRanker:
    """Ranks by an index of Seismic's."""

    kind = "bm25-fast"

    def __init__(self, folder: Path, documents: int, bm25: BM25Options, options: FastOptions) -> None:
        """`documents`: how many were indexed. Raises IndexFolderError where a file is damaged."""
        self.documents, self.bm25, self.options = documents, bm25, options
        try:
            words = json.loads((folder / WORDS).read_text(encoding="utf-8"))
            self.numbers = {word: number for number, word in enumerate(words)}
            self.weights: list[float] = np.load(folder / WEIGHTS, allow_pickle=False).tolist()
            _, index = _classes(len(words))
            self.index = index.load(str(folder / f"{VECTORS}.index.seismic"))
        except (OSError, ValueError) as error:
            raise IndexFolderError(f"{folder}: damaged: {' '.join(str(error).split())[:200]}") from None
        if len(self.weights) != len(words):
            raise IndexFolderError(f"{folder}: damaged: its vocabulary and weights disagree")

    def __len__(self) -> int:
        return self.documents

    @property
    def identity(self) -> Mapping[str, Any]:
        return {**asdict(self.bm25), **asdict(self.options)}

    def rank(self, queries: Sequence[str], topk: int) -> list[Hits]:
        """Places that share a word with the query, by score, then by place; some may be missing."""
        asked: list[Asked] = []
        for number, query in enumerate(queries):
            words_asked = split_words(query, self.bm25.words)
            known = Counter(word for word in words_asked if word in self.numbers)
            if known:
                words = [self.numbers[word] for word in known]
                values = [
                    count * self.weights[word] for word, count in zip(words, known.values(), strict=True)
                ]
                asked.append((number, words, values))
        return _search(self.index, len(queries), asked, topk, self.options)


def _search(
    index: Any, queries: int, asked: Sequence[Asked], topk: int, options: FastOptions | None = None
) -> list[Hits]:
    """Best places of each of so many queries, by score, then by place; exact (a data set) without options."""
    hits: list[Hits] = [[] for _ in range(queries)]
    if not asked:
        return hits
    text = seismic.get_seismic_string()
    effort = {"query_cut": options.followed, "heap_factor": options.promise} if options else {}
    for found in index.batch_search(
        np.array([str(number) for number, _, _ in asked], text),
        [np.array([*map(str, words)], text) for _, words, _ in asked],
        [np.array(values, np.float32) for _, _, values in asked],
        k=topk + TIES,
        **effort,
    ):
        if found:  # in any order, each hit with the name of its query
            best = sorted((-score, int(place)) for _, score, place in found)
            hits[int(found[0][0])] = [(place, -score) for score, place in best[:topk]]
    return hits


def build_seismic(
    folder: Path,
    texts: Iterable[str],
    bm25: BM25Options,
    options: FastOptions,
    counted: Callable[[int], None] | None = None,
) -> float:
    """Index the texts, in order; returns the recall. Raises DataError where there is no word to index.

    The recall is measured on queries of a few words of a passage each: the share of the SAMPLED_TOP best
    passages that a search finds, or of others that score as high.
    """
    vocabulary, chunks = _count(texts, counted)
    if not vocabulary:
        documents = sum(len(chunk.lengths) for chunk in chunks)
        raise DataError(f"nothing to index: {documents} documents without a word that is no stop word")
    lengths = np.concatenate([np.asarray(chunk.lengths) for chunk in chunks])
    containing = sum(np.bincount(chunk.words, minlength=len(vocabulary)) for chunk in chunks)
    norms = bm25.k1 * (1 - bm25.b + bm25.b * lengths / lengths.mean())
    weights = np.log(1 + (len(lengths) - containing + 0.5) / (containing + 0.5))
    asked = [(number, words, weights[words].tolist()) for number, words in enumerate(_samples(chunks))]
    dataset_class, index_class = _classes(len(vocabulary))
    dataset = dataset_class(len(vocabulary))
    place = pairs = 0
    while chunks:
        chunk = chunks.pop(0)
        here = slice(place, place + len(chunk.lengths))
        counts = np.asarray(chunk.counts)
        dataset.add_documents_by_id(
            [str(number) for number in range(here.start, here.stop)],
            np.asarray(chunk.words, dtype=np.int64),
            (counts / (counts + np.repeat(norms[here], chunk.sizes))).astype(np.float32),
            np.concatenate([[0], np.cumsum(chunk.sizes)]),
        )
        place, pairs = here.stop, pairs + len(counts)
    exact = _search(dataset, len(asked), asked, SAMPLED_TOP)
    # Seismic also drops the values that are lowest of all words'; `average` is so high that none is.
    average = -(-pairs // len(vocabulary))
    with _quiet():
        index = index_class.build_from_dataset(
            dataset,
            n_postings=average,
            max_fraction=options.kept / average,
            centroid_fraction=options.blocks,
            summary_energy=options.summary,
        )
        index.save(str(folder / VECTORS))
    np.save(folder / WEIGHTS, weights.astype(np.float32), allow_pickle=False)
    write_json(folder / WORDS, list(vocabulary))
    return _recall(exact, _search(index, len(asked), asked, SAMPLED_TOP, options))


def _samples(chunks: Sequence[_Chunk]) -> list[list[int]]:
    """A few words of some passages that lie evenly over the corpus."""
    rng = random.Random(0)
    passages = sum(len(chunk.sizes) for chunk in chunks)
    words = []
    for place in range(0, passages, -(-passages // SAMPLES)):
        chunk, row = chunks[place // CHUNK], place % CHUNK
        start = sum(chunk.sizes[:row])
        found = list(chunk.words[start : start + chunk.sizes[row]])
        if found:
            words.append(rng.sample(found, min(SAMPLED_WORDS, len(found))))
    return words


def _recall(exact: Sequence[Hits], found: Sequence[Hits]) -> float:
    shares = []
    for best, ours in zip(exact, found, strict=True):
        border = best[-1][1] * (1 - 2e-3)  # half precision
        shares.append(sum(score >= border for _, score in ours) / len(best))
    return float(np.mean(shares))


@dataclass(slots=True)
class _Chunk:
    """Some passages as rows of (word, count) pairs, words in ascending order."""

    words: array[int] = field(default_factory=lambda: array("i"))
    counts: array[int] = field(default_factory=lambda: array("i"))
    sizes: list[int] = field(default_factory=list)
    """Pairs of each passage."""
    lengths: list[int] = field(default_factory=list)
    """Words of each passage."""


def _count(
    texts: Iterable[str], counted: Callable[[int], None] | None
) -> tuple[dict[str, int], list[_Chunk]]:
    """The vocabulary, numbered by first appearance, and the word counts of every text."""
    vocabulary: dict[str, int] = {}
    chunks: list[_Chunk] = []
    for number, text in enumerate(texts):
        if number % CHUNK == 0:
            chunks.append(_Chunk())
        words = [vocabulary.setdefault(word, len(vocabulary)) for word in split_words(text)]
        found = sorted(Counter(words).items())
        chunk = chunks[-1]
        chunk.words.extend(word for word, _ in found)
        chunk.counts.extend(count for _, count in found)
        chunk.sizes.append(len(found))
        chunk.lengths.append(len(words))
        if counted is not None:
            counted(number + 1)
    return vocabulary, chunks


def _classes(words: int) -> tuple[Any, Any]:
    """Seismic's classes of a dataset and an index for a vocabulary of this size."""
    if words <= SMALL_VOCABULARY:
        return seismic.SeismicDataset, seismic.SeismicIndex
    return seismic.SeismicDatasetLV, seismic.SeismicIndexLV


@contextmanager
def _quiet() -> Iterator[None]:
    """Seismic prints progress to file descriptor 1, where a command prints its result; this discards it."""
    kept = os.dup(1)
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nothing)
