"""BM25 on disk by tantivy: postings stay in mapped files, so memory does not grow with the corpus.

The words are those of `bm25.split_words`. The formula is the same, with k1 = 1.2 and b = 0.75, which tantivy
fixes. tantivy keeps the length of a document in one byte, so scores differ a little and near ties may swap
(`benchmarks/retrieve.py` measures the recall).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tantivy

from rexrag.errors import DataError, IndexFolderError
from rexrag.retrieval.base import Hits
from rexrag.retrieval.rankers.bm25 import SPACED, split_words

FOLDER = "tantivy"
HEAP_BYTES = 128_000_000
"""Memory of the writer before it writes a segment to disk."""
TIES, MOST_TIES = 64, 4096
"""Further hits that are fetched, so that ties at the last one are ordered by place; at most MOST_TIES."""
COMMIT_EVERY = 100_000
"""Documents between two commits: what a kill can cost."""


class TantivyRanker:
    """Ranks by an index folder of tantivy's."""

    kind = "bm25-disk"

    def __init__(self, folder: Path, words: str = SPACED) -> None:
        """`words` names the word splitter. Raises IndexFolderError where tantivy cannot open the folder."""
        self.words = words
        try:
            index = tantivy.Index.open(str(folder / FOLDER))
            self.schema, self.searcher = index.schema, index.searcher()
        except (ValueError, OSError) as error:
            raise IndexFolderError(f"{folder / FOLDER}: damaged: {error}") from None
        self.threads = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="bm25-disk")

    def __len__(self) -> int:
        return int(self.searcher.num_docs)

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"words": self.words}

    def rank(self, queries: Sequence[str], topk: int) -> list[Hits]:
        """Places that share a word with the query, by score, then by place; none for unknown words."""
        if len(queries) == 1:
            return [self._rank(queries[0], topk)]
        return list(self.threads.map(self._rank, queries, [topk] * len(queries)))

    def _rank(self, query: str, topk: int) -> Hits:
        words = split_words(query, self.words)
        if not words or not len(self):
            return []
        terms = [
            (tantivy.Occur.Should, tantivy.Query.term_query(self.schema, "words", word, "freq"))
            for word in words
        ]
        wanted = tantivy.Query.boolean_query(terms)
        margin = TIES
        while True:
            hits = self._hits(wanted, min(topk + margin, len(self)))
            # Which of equal documents tantivy leaves out depends on how its segments were merged.
            if len(hits) < topk + margin or hits[topk - 1][1] > hits[-1][1] or margin > MOST_TIES:
                return hits[:topk]
            margin *= 8

    def _hits(self, query: tantivy.Query, limit: int) -> Hits:
        found = self.searcher.search(query, limit, count=False).hits
        places = self.searcher.fast_field_values("place", [address for _, address in found])
        # The order in which float32 parts are added varies too; the fifth decimal is noise.
        hits = [(int(place or 0), round(score, 4)) for (score, _), place in zip(found, places, strict=True)]
        return sorted(hits, key=lambda hit: (-hit[1], hit[0]))


def build_tantivy(
    folder: Path, texts: Callable[[int], Iterable[str]], counted: Callable[[int], None] | None = None
) -> None:
    """Index the texts from a place on (`texts(place)`), in order; goes on where an earlier call was killed.

    Raises DataError where there is no word to index.
    """
    target = folder / FOLDER
    target.mkdir(parents=True, exist_ok=True)
    index = tantivy.Index(_schema(), str(target))
    # One thread: documents are committed in order, so what is there is always the beginning of the corpus.
    writer = index.writer(heap_size=HEAP_BYTES, num_threads=1)
    place = start = int(index.searcher().num_docs)
    try:
        for place, text in enumerate(texts(start), start + 1):
            document = tantivy.Document()
            document.add_text("words", " ".join(split_words(text)))
            document.add_unsigned("place", place - 1)
            writer.add_document(document)
            if place % COMMIT_EVERY == 0:
                writer.commit()
            if counted is not None:
                counted(place)
        writer.commit()
        writer.wait_merging_threads()
    finally:
        del writer  # it holds a lock, and the traceback of an error would hold it
    index.reload()
    if not index.searcher().terms_with_prefix("words", "", limit=1):
        raise DataError(f"nothing to index: {place} documents without a word that is no stop word")
    for lock in target.glob(".tantivy-*.lock"):
        lock.unlink()


def _schema() -> tantivy.Schema:
    builder = tantivy.SchemaBuilder()
    builder.add_text_field("words", tokenizer_name="whitespace", index_option="freq")
    builder.add_unsigned_field("place", fast=True)
    return builder.build()
