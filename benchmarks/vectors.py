"""Approximate vector search against exact: build time and memory, start, queries/s, recall, by size.

    python benchmarks/vectors.py [--sizes 50000,200000,1000000] [--engines flat,hnsw,ivf-pq] [--json OUT.json]

Encoding a million passages takes hours on a CPU, so the vectors are made: unit vectors of `--dimension`
values around centres that lie in a space of fewer dimensions, with noise; queries are vectors with more
noise. Speed and memory depend on the size alone, recall on the data: see `benchmarks/retrieve.py --encoder`
for real text. Options are the defaults of `rexrag index build`.

Each engine builds in a process of its own and searches in another; rounds are interleaved, medians are shown.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieve import BATCH, child, resident, show
from rexrag.retrieval.rankers.dense import (
    VECTORS,
    DenseOptions,
    DenseRanker,
    build_ann,
    exact_nearest,
    open_vectors,
    tidy,
)

QUERIES = "queries.npy"
PIECE = 100_000


def make_vectors(folder: Path, count: int, dimension: int, queries: int) -> None:
    """Vectors and queries of one mixture; the same for the same arguments."""
    rng = np.random.default_rng(0)
    basis = rng.standard_normal((64, dimension), dtype=np.float32)
    centres = rng.standard_normal((max(16, count // 200), 64), dtype=np.float32) @ basis / 8

    def draw_tokens(number: int) -> NDArray[np.float32]:
        found = centres[rng.integers(len(centres), size=number)]
        found += 0.5 * rng.standard_normal((number, 64), dtype=np.float32) @ basis / 8
        return found + 0.2 * rng.standard_normal((number, dimension), dtype=np.float32)

    vectors = np.lib.format.open_memmap(folder / VECTORS, "w+", np.float32, (count, dimension))
    for start in range(0, count, PIECE):
        vectors[start : start + PIECE] = unit(draw_tokens(min(PIECE, count - start)))
    vectors.flush()
    asked = vectors[rng.choice(count, queries, replace=False)]
    noise = rng.standard_normal(asked.shape, dtype=np.float32) / dimension**0.5
    np.save(folder / QUERIES, unit(asked + 0.5 * noise))


def unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    found: NDArray[np.float32] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return found


def build(vectors: Path, index: Path, options: DenseOptions) -> dict[str, Any]:
    index.mkdir()
    os.link(vectors / VECTORS, index / VECTORS)
    begun = time.perf_counter()
    build_ann(index, options)
    tidy(index, options)
    seconds = time.perf_counter() - begun
    return {
        "build_s": seconds,
        "build_peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
        "disk_mb": sum(file.stat().st_size for file in index.iterdir()) / 1e6,
    }


def search(index: Path, options: DenseOptions, queries: NDArray[np.float32], topk: int) -> dict[str, Any]:
    begun = time.perf_counter()
    ranker = DenseRanker(index, None, options)  # type: ignore[arg-type] # vectors are given, nothing is encoded
    opened = time.perf_counter() - begun
    ranker.nearest(queries[:BATCH], topk)  # pages that every search reads
    begun = time.perf_counter()
    found = [
        hits
        for start in range(0, len(queries), BATCH)
        for hits in ranker.nearest(queries[start : start + BATCH], topk)
    ]
    seconds = time.perf_counter() - begun
    places = [[place for place, _ in hits] for hits in found]
    return {
        "open_s": opened,
        "queries_s": len(queries) / seconds,
        "resident_mb": resident(),
        "found": places,
    }


def run_child(task: dict[str, Any]) -> None:
    vectors, index, options = Path(task["vectors"]), Path(task["index"]), DenseOptions(**task["options"])
    if task["do"] == "build":
        print(json.dumps(build(vectors, index, options)))
    else:
        print(json.dumps(search(index, options, np.load(vectors / QUERIES), task["topk"])))


def compare(folder: Path, count: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    make_vectors(folder, count, args.dimension, args.queries)
    exact = exact_nearest(open_vectors(folder), np.load(folder / QUERIES), args.topk)
    rows: dict[str, dict[str, Any]] = {}
    tasks: dict[str, dict[str, Any]] = {}
    for engine in args.engines.split(","):
        options = asdict(DenseOptions(engine).resolved(count, args.dimension))
        index = str(folder / engine)
        tasks[engine] = {"vectors": str(folder), "index": index, "options": options, "topk": args.topk}
        rows[engine] = {
            "engine": engine,
            "options": options,
            **child({**tasks[engine], "do": "build"}, __file__),
        }
        print(f"  {engine}: built in {rows[engine]['build_s']:.1f} s", file=sys.stderr, flush=True)
    rounds: dict[str, list[dict[str, Any]]] = {engine: [] for engine in tasks}
    for _ in range(args.rounds):
        for engine, task in tasks.items():
            rounds[engine].append(child({**task, "do": "search"}, __file__))
    for engine, row in rows.items():
        for name in ("open_s", "queries_s", "resident_mb"):
            row[name] = statistics.median(found[name] for found in rounds[engine])
        shares = [
            len(set(places) & {place for place, _ in hits}) / len(hits)
            for places, hits in zip(rounds[engine][0]["found"], exact, strict=True)
        ]
        row["recall"] = statistics.mean(shares)
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="50000,200000,1000000")
    parser.add_argument("--engines", default="flat,hnsw,ivf-pq")
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--queries", type=int, default=320)
    parser.add_argument("--topk", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return run_child(json.loads(args.child))
    report: dict[str, Any] = {"machine": f"{os.cpu_count()} cores, {platform.platform()}", "tables": {}}
    for size in map(int, args.sizes.split(",")):
        with tempfile.TemporaryDirectory() as temporary:
            rows = compare(Path(temporary), size, args)
        title = f"{size:,} made vectors of {args.dimension} values"
        show(title, rows, args.topk)
        report["tables"][title] = rows
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
