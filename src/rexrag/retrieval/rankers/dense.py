"""Dense retrieval: unit vectors of passages, searched exactly or by an approximate index (faiss).

| ann | what is searched | exact |
|---|---|---|
| `flat` | every vector, in blocks from a mapped file | yes |
| `hnsw` | a graph of near neighbours (Malkov & Yashunin 2018) that holds the vectors | no |
| `ivf-pq` | the nearest lists, by product-quantised codes (Jégou et al. 2011), then the best exactly | no |

Scores are cosine similarities. All files are mapped; nothing is read before it is needed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rexrag.errors import ConfigError, IndexFolderError
from rexrag.io import write_text
from rexrag.retrieval.base import Hits
from rexrag.retrieval.rankers.encoder import NEEDED, Encoder

if not find_spec("sentence_transformers"):
    raise ConfigError(NEEDED)
try:
    import faiss
except ImportError:
    raise ConfigError(NEEDED) from None

VECTORS = "vectors.npy"
"""float32 [N, dimension]; removed after the build where no search reads it."""
DONE = "vectors.done"
ANN = "ann.faiss"
CHUNK = 1024
"""Passages encoded before progress is written down."""
BLOCK = 100_000
"""Vectors searched or added at a time."""
SAVE_EVERY = 1_000_000
"""Vectors added between two saves of an unfinished approximate index."""
FEWEST_TRAINED = 256
"""Vectors that ivf-pq needs: one for each of the 256 centroids of a code byte."""
WELL_TRAINED = 39 * FEWEST_TRAINED
"""faiss calls codes poor that were learned from fewer than 39 vectors a centroid."""


@dataclass(frozen=True, slots=True)
class DenseOptions:
    """How vectors are searched. 0 takes the default for the size of the corpus (`resolved`)."""

    ann: str = "flat"
    links: int = 32
    """hnsw: M, neighbours a node keeps (2·M on the lowest level)."""
    build_effort: int = 100
    """hnsw: efConstruction."""
    effort: int = 0
    """Candidates looked at: hnsw efSearch (default 128), ivf-pq lists probed (default 1/16, at least 64)."""
    lists: int = 0
    """ivf-pq: default 4·√N, as faiss's guidelines have it, and at least 40 vectors a list."""
    code_bytes: int = 0
    """ivf-pq: bytes a vector; default a quarter of the dimension."""
    refine: int = 8
    """ivf-pq: this many times topk are scored again with the exact vectors; 0 keeps no vectors."""

    def __post_init__(self) -> None:
        if self.ann not in ("flat", "hnsw", "ivf-pq"):
            raise ConfigError(f"ann is '{self.ann}'; expected flat, hnsw or ivf-pq")
        for name in ("links", "build_effort"):
            if getattr(self, name) < 2:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 2")
        for name in ("effort", "lists", "code_bytes", "refine"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 0")

    def resolved(self, documents: int, dimension: int) -> DenseOptions:
        """The same with every 0 replaced. Raises ConfigError where the corpus is too small."""
        if self.ann == "flat":
            return self
        if self.ann == "hnsw":
            return DenseOptions(**{**asdict(self), "effort": self.effort or 128})
        if documents < FEWEST_TRAINED:
            raise ConfigError(
                f"ivf-pq needs at least {FEWEST_TRAINED} passages, the corpus has {documents}; take flat"
            )
        lists = self.lists or max(1, min(int(4 * math.sqrt(documents)), documents // 40))
        code_bytes = self.code_bytes or max(m for m in range(1, dimension // 4 + 1) if dimension % m == 0)
        if dimension % code_bytes:
            raise ConfigError(f"code_bytes is {code_bytes}; expected a divisor of the dimension {dimension}")
        effort = min(lists, self.effort or max(64, lists // 16))
        return DenseOptions(**{**asdict(self), "lists": lists, "code_bytes": code_bytes, "effort": effort})

    def trained_on(self, documents: int) -> int:
        """ivf-pq: vectors that lists and codes are learned from; faiss advises 30 to 256 a list."""
        return min(documents, max(64 * self.lists, 65_536))

    @property
    def keeps_vectors(self) -> bool:
        return self.ann == "flat" or (self.ann == "ivf-pq" and self.refine > 0)


class DenseRanker:
    """Ranks by cosine similarity of an encoder's vectors."""

    kind = "dense"

    def __init__(self, folder: Path, encoder: Encoder, options: DenseOptions) -> None:
        """Raises IndexFolderError where a file is damaged."""
        self.encoder, self.options = encoder, options
        try:
            self.vectors = open_vectors(folder) if options.keeps_vectors else None
            self.ann: Any = None if options.ann == "flat" else _open_ann(folder / ANN, options)
        except (RuntimeError, ValueError, OSError) as error:
            raise IndexFolderError(f"{folder}: damaged: {' '.join(str(error).split())[:200]}") from None

    def __len__(self) -> int:
        return len(self.vectors) if self.vectors is not None else int(self.ann.ntotal)

    @property
    def identity(self) -> Mapping[str, Any]:
        # The name is left out: the same weights may lie elsewhere.
        return {"encoder": {**asdict(self.encoder.card), "model": ""}, **asdict(self.options)}

    def rank(self, queries: Sequence[str], topk: int) -> list[Hits]:
        return self.nearest(self.encoder.queries(queries), topk)

    def nearest(self, queries: NDArray[np.float32], topk: int) -> list[Hits]:
        """The nearest places of query vectors [Q, dimension], nearest first."""
        topk = min(topk, len(self))
        if not len(queries):
            return []
        if self.ann is None:
            assert self.vectors is not None
            return exact_nearest(self.vectors, queries, topk)
        if self.vectors is None:
            return _hits(*self.ann.search(queries, topk))
        _, places = self.ann.search(queries, min(topk * self.options.refine, len(self)))
        return [
            _rescored(self.vectors, query, found[found >= 0], topk)
            for query, found in zip(queries, places, strict=True)
        ]


def exact_nearest(vectors: NDArray[np.float32], queries: NDArray[np.float32], topk: int) -> list[Hits]:
    """The nearest of all vectors [N, d] to each query [Q, d], one block in memory at a time."""
    scores, places = np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64)
    for start in range(0, len(vectors), BLOCK):
        block = np.ascontiguousarray(vectors[start : start + BLOCK])
        near, where = faiss.knn(queries, block, min(topk, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
        scores, places = np.hstack([scores, near]), np.hstack([places, where + start])
        order = np.argsort(-scores, axis=1, kind="stable")[:, :topk]
        scores, places = np.take_along_axis(scores, order, 1), np.take_along_axis(places, order, 1)
    return _hits(scores, places)


def open_vectors(folder: Path) -> NDArray[np.float32]:
    vectors: NDArray[np.float32] = np.load(folder / VECTORS, mmap_mode="r", allow_pickle=False)
    return vectors


def build_vectors(
    folder: Path,
    texts: Callable[[int], Iterable[str]],
    documents: int,
    encoder: Encoder,
    counted: Callable[[int], None] | None = None,
) -> None:
    """Encode the texts from a place on (`texts(place)`) into the mapped file; goes on after a kill."""
    path, note = folder / VECTORS, folder / DONE
    done = int(note.read_text()) if note.is_file() and path.is_file() else 0
    shape = (documents, encoder.card.dimension)
    vectors = np.lib.format.open_memmap(
        path, mode="r+" if done else "w+", dtype=np.float32, shape=None if done else shape
    )
    stream: Iterator[str] = iter(texts(done))
    if counted is not None:
        counted(done)  # the first chunk can take half a minute
    while chunk := list(islice(stream, CHUNK)):
        vectors[done : done + len(chunk)] = encoder.passages(chunk)
        done += len(chunk)
        vectors.flush()
        write_text(note, str(done))
        if counted is not None:
            counted(done)


def build_ann(folder: Path, options: DenseOptions, counted: Callable[[int], None] | None = None) -> None:
    """Index the vectors of a folder by `options` (resolved); goes on after a kill."""
    if options.ann != "flat":
        vectors = open_vectors(folder)
        partial = folder / f"{ANN}.partial"
        index = faiss.read_index(str(partial)) if partial.is_file() else _train(vectors, options)
        saved = index.ntotal
        if counted is not None:
            counted(index.ntotal)
        while index.ntotal < len(vectors):
            index.add(np.ascontiguousarray(vectors[index.ntotal : index.ntotal + BLOCK // 10]))
            if counted is not None:
                counted(index.ntotal)
            if index.ntotal - saved >= SAVE_EVERY:
                _write(index, partial)
                saved = index.ntotal
        _write(index, folder / ANN)
        partial.unlink(missing_ok=True)


def tidy(folder: Path, options: DenseOptions) -> None:
    """Remove the files that only the build needed."""
    if not options.keeps_vectors:
        (folder / VECTORS).unlink(missing_ok=True)
    (folder / DONE).unlink(missing_ok=True)


def _train(vectors: NDArray[np.float32], options: DenseOptions) -> Any:
    dimension = vectors.shape[1]
    if options.ann == "hnsw":
        index = faiss.IndexHNSWFlat(dimension, options.links, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = options.build_effort
        return index
    index = faiss.index_factory(
        dimension, f"IVF{options.lists},PQ{options.code_bytes}", faiss.METRIC_INNER_PRODUCT
    )
    # Polysemous training orders centroids for a Hamming filter, which no search here uses; it is slow.
    index.do_polysemous_training = False
    # faiss would warn for each byte of code that few vectors make poor codes; `estimate` says so once.
    index.cp.min_points_per_centroid = index.pq.cp.min_points_per_centroid = 1
    count = options.trained_on(len(vectors))
    sample = np.sort(np.random.default_rng(0).choice(len(vectors), count, replace=False))
    index.train(np.ascontiguousarray(vectors[sample]))
    return index


def _write(index: Any, path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    faiss.write_index(index, str(temporary))
    os.replace(temporary, path)


def _open_ann(path: Path, options: DenseOptions) -> Any:
    # faiss has a flag that maps the lists of an IVF, and another that maps an HNSW's graph and vectors.
    flag = faiss.IO_FLAG_MMAP if options.ann == "ivf-pq" else faiss.IO_FLAG_MMAP_IFC
    index = faiss.read_index(str(path), flag)
    if options.ann == "ivf-pq":
        index.nprobe = options.effort
    else:
        index.hnsw.efSearch = options.effort
    return index


def _hits(scores: NDArray[np.float32], places: NDArray[np.int64]) -> list[Hits]:
    return [
        [(int(place), float(score)) for place, score in zip(where, row, strict=True) if place >= 0]
        for row, where in zip(scores, places, strict=True)
    ]


def _rescored(
    vectors: NDArray[np.float32], query: NDArray[np.float32], places: NDArray[np.int64], topk: int
) -> Hits:
    places = np.sort(places)
    scores = np.asarray(vectors[places]) @ query
    order = np.argsort(-scores, kind="stable")[:topk]
    return [(int(places[i]), float(scores[i])) for i in order]
