"""What building an index will need, said before it starts: passages, disk, memory.

The first rows of the corpus are counted; bytes follow from the constants below, which were measured on
corpora of up to a million passages. How long it takes is not said: the progress of the build shows that.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from rexrag.errors import ConfigError, DataError
from rexrag.io import check_writable, open_text, packing
from rexrag.retrieval.corpus import read_corpus
from rexrag.retrieval.index.build import MANY_PASSAGES, BuildOptions
from rexrag.retrieval.rankers.bm25 import has_unspaced, split_words
from rexrag.types import Document

SAMPLE = 2000
"""Rows that are read."""
PROBES, PROBE_BYTES = 64, 65_536
"""Stretches of the file in which line ends are counted, and their length."""
PACKED_BYTES = 2**22
"""Unpacked bytes that tell how far a corpus is packed."""
BASE_MEMORY, ENCODER_MEMORY = 350e6, 800e6
"""Python with the index libraries and their buffers; torch and an encoder on top."""
PAIR_BYTES = {"bm25": 8.0, "bm25-disk": 2.5, "bm25-fast": 17.0}
"""On disk, for each different word of each passage."""
PAIR_MEMORY = {"bm25": 60.0, "bm25-disk": 0.0, "bm25-fast": 85.0}
"""While it is built, for the same."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes, and the number of passages."""

    documents: int
    disk: float
    """The finished folder."""
    scratch: float
    """What lies beside it while it is built."""
    free_disk: float
    memory: float
    warnings: tuple[str, ...] = ()


def estimate(corpus: str | Path, out: str | Path, options: BuildOptions) -> Estimate:
    """Raises DataError where the first rows are wrong, ConfigError where the disk is too small or an extra is
    missing, OSError where nothing can be made at `out`."""
    size = _size(corpus)
    check_writable(out)
    rows = list(islice(read_corpus(corpus), SAMPLE))
    documents = len(rows) if len(rows) < SAMPLE else max(len(rows), _lines(corpus, size))
    lines = [json.dumps({"id": row.id, "contents": row.contents}, ensure_ascii=False) for row in rows]
    disk = documents * (8 + sum(len(line.encode()) + 1 for line in lines) / len(rows))
    memory = BASE_MEMORY + 16.0 * documents
    scratch = 0.0
    if options.lexical_part:
        pairs = documents * sum(len(set(split_words(row.contents))) for row in rows) / len(rows)
        disk += PAIR_BYTES[options.lexical_part] * pairs + 12 * documents
        memory += PAIR_MEMORY[options.lexical_part] * pairs
    if options.lexical_part == "bm25-fast":
        import rexrag.retrieval.rankers.seismic  # noqa: F401 - says where the extra is missing
    if options.dense_part:
        vectors, scratch, held = _dense(documents, options)
        disk, memory = disk + vectors, max(memory, BASE_MEMORY + ENCODER_MEMORY + held)
    free = _free(out) + _begun(out)
    if disk + scratch > free:
        raise ConfigError(
            f"{out}: about {size_text(disk + scratch)} of disk are needed for the index, "
            f"{size_text(free)} are free"
        )
    found = Estimate(documents, disk, scratch, free, memory)
    return replace(found, warnings=tuple(_warnings(found, rows, options)))


def size_text(count: float) -> str:
    """A number of bytes as people say it."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{max(1, round(count / 1e3))} kB"


def available_memory() -> float:
    """Memory that can be had without swapping, in bytes; infinite where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next(
        (1024.0 * int(row.split()[1]) for row in lines if row.startswith("MemAvailable")), float("inf")
    )


def _dense(documents: int, options: BuildOptions) -> tuple[float, float, float]:
    """Disk, scratch and memory of the vectors and of the approximate index."""
    from rexrag.retrieval.rankers.dense import DenseOptions
    from rexrag.retrieval.rankers.encoder import Encoder

    dimension = Encoder(options.encoder).card.dimension
    dense = DenseOptions(**options.dense).resolved(documents, dimension)
    vectors = 4.0 * documents * dimension
    ann = {
        "flat": 0.0,
        "hnsw": vectors + documents * (8.4 * dense.links + 16),
        "ivf-pq": documents * (dense.code_bytes + 8.0) + 4.0 * dense.lists * dimension,
    }[dense.ann]
    training = 4.0 * dense.trained_on(documents) * dimension if dense.ann == "ivf-pq" else 0.0
    if dense.keeps_vectors:
        return vectors + ann, ann, ann + training
    return ann, ann + vectors, ann + training


def _warnings(found: Estimate, rows: list[Document], options: BuildOptions) -> list[str]:
    warnings = []
    if found.memory > available_memory():
        warnings.append(
            f"about {size_text(found.memory)} of memory are needed, {size_text(available_memory())} are free"
        )
    if options.lexical_part == "bm25" and found.documents > MANY_PASSAGES:
        warnings.append(f"bm25-disk and bm25-fast are made for more than {MANY_PASSAGES:,} passages")
    if options.dense_part and options.dense.get("ann") == "ivf-pq":
        from rexrag.retrieval.rankers.dense import WELL_TRAINED

        if found.documents < WELL_TRAINED:
            warnings.append(
                f"ivf-pq learns poor codes from fewer than {WELL_TRAINED:,} passages; flat is exact"
            )
    if options.lexical_part and any(has_unspaced(row.contents) for row in rows):
        warnings.append(
            "parts of the corpus are in a script without spaces; they are indexed by single characters and "
            "pairs, which finds names but ranks less well than words would"
        )
    return warnings


def _begun(out: str | Path) -> int:
    """Bytes of an unfinished build of `out`, which need not be found again."""
    partial = Path(out).with_name(f"{Path(out).name}.partial")
    return sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())


def _lines(corpus: str | Path, size: int) -> int:
    """About how many lines a file has, counted in PROBES stretches: rows at the start may be of one kind."""
    if packing(corpus):
        return _packed_lines(corpus, size)
    ends = read = 0
    with Path(corpus).open("rb") as file:
        for probe in range(PROBES):
            file.seek(size * probe // PROBES)
            stretch = file.read(min(PROBE_BYTES, size // PROBES))
            ends, read = ends + stretch.count(b"\n"), read + len(stretch)
    return round(size * ends / max(1, read))


def _packed_lines(corpus: str | Path, size: int) -> int:
    """The same for a packed file, from its beginning alone: packed, a text takes a third of its bytes."""
    with open_text(corpus) as file:
        stretch = file.read(PACKED_BYTES)
    return round(3 * size * stretch.count(b"\n") / max(1, len(stretch)))


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
