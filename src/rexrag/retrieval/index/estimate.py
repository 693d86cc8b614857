"""What building an index will need, said before it starts: passages, disk, memory, rough time.

Counts come from the first rows of the corpus, seconds from doing a little of the work on this machine, bytes
from the formulae below (docs/guides/retrieval.md shows them).
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from rexrag.errors import ConfigError, DataError
from rexrag.io import check_writable
from rexrag.retrieval.corpus import read_corpus
from rexrag.retrieval.index.build import MANY_PASSAGES, BuildOptions
from rexrag.retrieval.rankers.bm25 import split_words
from rexrag.retrieval.rankers.tantivy import HEAP_BYTES

SAMPLE = 2000
PROBES, PROBE_BYTES = 64, 65_536
ENCODED = 64
BASE_MEMORY = 100e6
"""Python with numpy and the index libraries; torch and an encoder are another ENCODER_MEMORY."""
ENCODER_MEMORY = 800e6
WORD_BYTES = 8
"""bm25: one word of a passage while it is built, a pointer to its number."""
SCORE_BYTES_BUILD = 44
"""bm25: one (word, passage) pair while it is built: score, passage, word, and their sorted copies."""
SCORE_BYTES = 8
"""bm25: one pair on disk, a float32 and an int32."""
POSTING_BYTES = 2.5
"""bm25-disk: one pair on disk, packed differences of passage numbers and counts."""
FAST_BYTES_BUILD = 85
"""bm25-fast: one pair while it is built (measured: 80 and 85)."""
FAST_BYTES, KEPT_BYTES = 4, 13
"""bm25-fast: one pair on disk and in memory, and what is added where a search can reach it."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Estimates; bytes and seconds."""

    documents: int
    disk: float
    """The finished folder."""
    scratch: float
    """What lies beside it only while it is built."""
    memory: float
    seconds: float
    free_disk: float
    free_memory: float
    warnings: tuple[str, ...]


def plan(corpus: str | Path, out: str | Path, options: BuildOptions) -> Plan:
    """Estimate. Raises DataError where the first rows are wrong, ConfigError where the disk is too small.

    OSError where nothing can be made at `out`.
    """
    size = _size(corpus)
    check_writable(out)
    begun = time.perf_counter()
    rows = list(islice(read_corpus(corpus), SAMPLE))
    reading = (time.perf_counter() - begun) / len(rows)
    line = sum(
        len(json.dumps({"id": d.id, "contents": d.contents}, ensure_ascii=False).encode()) + 1 for d in rows
    )
    documents = len(rows) if len(rows) < SAMPLE else max(len(rows), _lines(corpus, size))
    disk, scratch, memory = (
        1.02 * documents * line / len(rows) + 8 * documents,
        0.0,
        BASE_MEMORY + 16 * documents,
    )
    seconds = 3 * reading * documents
    if options.lexical_part:
        part = _lexical(documents, [document.contents for document in rows], options.lexical_part)
        disk, memory, seconds = disk + part[0], memory + part[1], seconds + part[2]
    if options.dense_part:
        more = _dense(documents, [document.contents for document in rows[:ENCODED]], options)
        disk, scratch, memory, seconds = disk + more[0], more[1], max(memory, more[2]), seconds + more[3]
    return _judged(
        Plan(documents, disk, scratch, memory, seconds, _free(out) + _begun(out), available_memory(), ()),
        options,
        out,
    )


def _lexical(documents: int, sample: list[str], kind: str) -> tuple[float, float, float]:
    """Disk, memory, seconds of the BM25 part."""
    begun = time.perf_counter()
    words = [split_words(text) for text in sample]
    each = documents / len(sample)
    splitting = (time.perf_counter() - begun) * each
    containing = Counter(word for found in words for word in set(found))
    pairs = each * containing.total()
    if kind == "bm25-disk":
        return POSTING_BYTES * pairs + 12 * documents, 2 * HEAP_BYTES, 2 * splitting
    if kind == "bm25-fast":
        from rexrag.retrieval.rankers.seismic import FastOptions

        kept = sum(min(each * count, FastOptions().kept) for count in containing.values())
        disk = FAST_BYTES * pairs + KEPT_BYTES * kept + 10 * documents
        return disk, FAST_BYTES_BUILD * pairs, 4 * splitting
    total = each * sum(map(len, words))
    return SCORE_BYTES * pairs, WORD_BYTES * total + 64 * documents + SCORE_BYTES_BUILD * pairs, 3 * splitting


def _dense(documents: int, sample: list[str], options: BuildOptions) -> tuple[float, float, float, float]:
    """Disk, scratch, memory, seconds of the dense part."""
    from rexrag.retrieval.rankers.dense import DenseOptions
    from rexrag.retrieval.rankers.encoder import Encoder

    encoder = Encoder(
        options.encoder, query_prefix=options.query_prefix, passage_prefix=options.passage_prefix
    )
    encoder.passages(sample[:4])
    begun = time.perf_counter()
    encoder.passages(sample)
    encoding = (time.perf_counter() - begun) / len(sample)
    dense = DenseOptions(**options.dense).settled(documents, encoder.card.dimension)
    vectors = 4.0 * documents * encoder.card.dimension
    ann = {
        "flat": 0.0,
        "hnsw": vectors + documents * (8.0 * dense.links * 1.05 + 16),
        "ivf-pq": documents * (dense.code_bytes + 8.0) + 4.0 * dense.lists * encoder.card.dimension,
    }[dense.ann]
    disk = (vectors if dense.keeps_vectors else 0.0) + ann
    scratch = ann + (0.0 if dense.keeps_vectors else vectors)
    training = 4.0 * dense.trained_on(documents) * encoder.card.dimension
    memory = BASE_MEMORY + ENCODER_MEMORY + ann + (training if dense.ann == "ivf-pq" else 0.0)
    return disk, scratch if dense.ann != "flat" else 0.0, memory, encoding * documents


def _begun(out: str | Path) -> int:
    """Bytes of an unfinished build of `out`, which need not be found again."""
    partial = Path(out).with_name(f"{Path(out).name}.partial")
    return sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())


def _judged(found: Plan, options: BuildOptions, out: str | Path) -> Plan:
    need = found.disk + found.scratch
    if need > found.free_disk:
        raise ConfigError(
            f"{out}: about {need / 1e9:.1f} GB of disk are needed, {found.free_disk / 1e9:.1f} GB are free"
        )
    warnings = []
    if found.memory > found.free_memory:
        warnings.append(
            f"about {found.memory / 1e9:.1f} GB of memory are needed, "
            f"{found.free_memory / 1e9:.1f} GB are free"
        )
    if options.lexical_part == "bm25" and found.documents > MANY_PASSAGES:
        warnings.append(f"bm25-disk and bm25-fast are made for more than {MANY_PASSAGES:,} passages")
    if options.dense_part and options.dense.get("ann") == "ivf-pq":
        from rexrag.retrieval.rankers.dense import WELL_TRAINED

        if found.documents < WELL_TRAINED:
            warnings.append(
                f"ivf-pq learns poor codes from fewer than {WELL_TRAINED:,} passages; flat is exact"
            )
    if options.dense_part and options.dense.get("ann") == "hnsw":
        warnings.append("building the hnsw graph comes on top of the time and cannot be told beforehand")
    return Plan(**{**{name: getattr(found, name) for name in found.__slots__}, "warnings": tuple(warnings)})


def _lines(corpus: str | Path, size: int) -> int:
    """About how many lines a file has, counted in PROBES stretches: rows at the start may be of one kind."""
    ends = read = 0
    with Path(corpus).open("rb") as file:
        for probe in range(PROBES):
            file.seek(size * probe // PROBES)
            stretch = file.read(min(PROBE_BYTES, size // PROBES))
            ends, read = ends + stretch.count(b"\n"), read + len(stretch)
    return round(size * ends / max(1, read))


def _size(corpus: str | Path) -> int:
    try:
        return Path(corpus).stat().st_size
    except OSError as error:
        raise DataError((error.strerror or "not readable").lower(), file=corpus) from None


def _free(out: str | Path) -> float:
    folder = Path(out).absolute().parent
    while not folder.exists():
        folder = folder.parent
    return float(shutil.disk_usage(folder).free)


def available_memory() -> float:
    """Memory that can be had without swapping, in bytes; infinite where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next(
        (1024.0 * int(row.split()[1]) for row in lines if row.startswith("MemAvailable")), float("inf")
    )
