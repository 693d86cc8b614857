"""Retrievers side by side: build time and memory, start, resident memory, batch queries/s, recall.

    python benchmarks/retrieve.py [--sizes 12000,200000,1000000] [--json OUT.json]
    python benchmarks/retrieve.py --corpus corpus.jsonl --questions dev.jsonl     # a corpus of your own
    python benchmarks/retrieve.py --corpus corpus.jsonl --questions dev.jsonl --grow 1000000
    python benchmarks/retrieve.py --engines bm25s,seismic                         # seismic: the extra `fast`
    python benchmarks/retrieve.py --encoder DIR [--sizes …]                       # flat, hnsw, ivf-pq too

Corpora come from the fictional world, whose few hundred words are each in several per cent of the passages:
a hard case for BM25. `--grow` makes more passages of your own corpus by drawing sentences from all of it, so
that a word is in the same share of passages as there.

Each engine builds in a process of its own and searches in another (peak and resident memory are that
process's); rounds of the engines are interleaved, medians are shown. Building hnsw and ivf-pq starts from the
vectors that flat has encoded.

Exact: BM25 by its formula in float64, posting by posting (`exact_bm25`); for vectors, the matrix product.
Recall@k counts a passage as right whose exact score is at least the k-th best, so equal passages are equally
right. rank_bm25 has another idf and k1, so what it misses is partly the formula; it searches one query at a
time through all passages, so it answers `--slow-queries` only.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rexrag.data.world.generator import World
from rexrag.retrieval.corpus import read_corpus
from rexrag.retrieval.index.build import BuildOptions, build_index
from rexrag.retrieval.index.documents import DOCUMENTS, OFFSETS
from rexrag.retrieval.index.folder import load_index, read_manifest, write_manifest
from rexrag.retrieval.rankers.bm25 import BM25Options, split_words

BATCH = 64
ENGINES = {"bm25s": "bm25", "tantivy": "bm25-disk", "seismic": "bm25-fast", "rank_bm25": ""}
DENSE = ("flat", "hnsw", "ivf-pq")


def make_corpus(folder: Path, passages: int) -> tuple[Path, Path]:
    """Corpus and questions of a world of about so many passages; made once."""
    target = folder / f"world-{passages}"
    if not (target / "dev.jsonl").is_file():
        World(0, max(12, round(passages / 2.08))).write(target, 10, max(20, min(1000, passages // 50)))
    return target / "corpus.jsonl", target / "dev.jsonl"


def grow(folder: Path, corpus: Path, passages: int) -> Path:
    """The corpus, and after it passages of sentences drawn from all of it, until there are so many."""
    target = folder / f"grown-{passages}.jsonl"
    rng = random.Random(0)
    rows = [(document.title, document.text.split(". ")) for document in read_corpus(corpus)]
    sentences = [sentence for _, text in rows for sentence in text if sentence.strip()]
    with target.open("w", encoding="utf-8") as file:
        for number in range(passages):
            title, text = rows[number] if number < len(rows) else rng.choice(rows)
            if number >= len(rows):
                text = rng.choices(sentences, k=len(text))
            row = {"id": str(number), "title": title, "text": ". ".join(text)}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return target


def read_questions(path: Path, limit: int) -> list[str]:
    return [json.loads(row)["question"] for row in path.read_text(encoding="utf-8").splitlines()][:limit]


def exact_bm25(corpus: Path, queries: list[str], options: BM25Options) -> list[NDArray[np.float64]]:
    """Scores [N] of each query by the formula of `rexrag.retrieval.rankers.bm25`, in float64."""
    wanted = {word for query in queries for word in split_words(query)}
    postings: dict[str, list[tuple[int, int]]] = {word: [] for word in wanted}
    lengths: list[int] = []
    for place, document in enumerate(read_corpus(corpus)):
        words = split_words(document.contents)
        lengths.append(len(words))
        for word, count in Counter(word for word in words if word in wanted).items():
            postings[word].append((place, count))
    length = np.asarray(lengths, dtype=np.float64)
    norm = options.k1 * (1 - options.b + options.b * length / length.mean())
    parts = {}
    for word, found in postings.items():
        places = np.fromiter((place for place, _ in found), np.int64, len(found))
        counts = np.fromiter((count for _, count in found), np.float64, len(found))
        idf = math.log(1 + (len(length) - len(found) + 0.5) / (len(found) + 0.5))
        parts[word] = (places, idf * counts / (counts + norm[places]))
    scores = []
    for query in queries:
        total = np.zeros(len(length))
        for word in split_words(query):
            places, part = parts[word]
            total[places] += part
        scores.append(total)
    return scores


def recall(found: list[list[int]], exact: list[NDArray[np.float64]], topk: int) -> float:
    """Mean share of the k best that were found; a passage that ties with the k-th best is as good."""
    shares = []
    for places, scores in zip(found, exact, strict=True):
        positive = int((scores > 0).sum())
        if positive:
            k = min(topk, positive)
            border = np.partition(scores, len(scores) - k)[len(scores) - k]
            shares.append(sum(scores[place] >= border - 1e-6 for place in places[:k]) / k)
    return statistics.mean(shares) if shares else 1.0


def resident() -> float:
    """Megabytes of this process in memory that are its own or mapped and read."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def build(engine: str, corpus: Path, index: Path, encoder: str) -> dict[str, Any]:
    begun = time.perf_counter()
    if engine == "rank_bm25":
        from rank_bm25 import BM25Okapi

        BM25Okapi([split_words(document.contents) for document in read_corpus(corpus)])
    elif engine == "flat":
        build_index(corpus, index, BuildOptions(kind="dense", encoder=encoder))
    elif engine in DENSE:
        build_from_flat(engine, index.with_name("flat"), index)
    else:
        build_index(corpus, index, BuildOptions(kind=ENGINES[engine]))
    seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    disk = sum(f.stat().st_size for f in index.rglob("*") if f.is_file()) / 1e6 if index.exists() else 0.0
    return {"build_s": seconds, "build_peak_mb": peak, "disk_mb": disk}


def build_from_flat(ann: str, flat: Path, index: Path) -> None:
    """An approximate index over the vectors of a flat one."""
    from rexrag.retrieval.rankers.dense import VECTORS, DenseOptions, build_ann, tidy

    index.mkdir()
    for name in (VECTORS, DOCUMENTS, OFFSETS):
        os.link(flat / name, index / name)
    manifest = read_manifest(flat)
    card = manifest["options"]["encoder"]
    options = DenseOptions(ann).resolved(manifest["documents"], card["dimension"])
    build_ann(index, options)
    tidy(index, options)
    recorded = {"encoder": card, **asdict(options)}
    write_manifest(index, "dense", manifest["corpus_digest"], manifest["documents"], recorded)


def search(engine: str, corpus: Path, index: Path, queries: list[str], topk: int) -> dict[str, Any]:
    """Open, search in batches of 64, and say what was found, as places in the corpus."""
    begun = time.perf_counter()
    found: list[list[int]] = []
    if engine == "rank_bm25":
        from rank_bm25 import BM25Okapi

        ranked = BM25Okapi([split_words(document.contents) for document in read_corpus(corpus)])
        opened = time.perf_counter() - begun
        begun = time.perf_counter()
        for query in queries:
            scores = ranked.get_scores(split_words(query))
            found.append(np.argsort(-scores, kind="stable")[:topk].tolist())
    else:
        retriever = load_index(index)
        opened = time.perf_counter() - begun
        retriever.search(queries[:BATCH], topk)  # pages that every search reads
        begun = time.perf_counter()
        for start in range(0, len(queries), BATCH):
            hits = retriever.ranker.rank(queries[start : start + BATCH], topk)
            for ranking in hits:  # the passages themselves are part of an answer
                found.append([place for place, _ in ranking])
                _ = [retriever.documents[place] for place, _ in ranking]
    seconds = time.perf_counter() - begun
    return {"open_s": opened, "queries_s": len(queries) / seconds, "resident_mb": resident(), "found": found}


def child(task: dict[str, Any], script: str = __file__) -> dict[str, Any]:
    """Run one task of a script in a new process, so that its memory is its own."""
    done = subprocess.run(
        [sys.executable, script, "--child", json.dumps(task)], stdout=subprocess.PIPE, text=True, check=True
    )
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def run_child(task: dict[str, Any]) -> None:
    corpus, index = Path(task["corpus"]), Path(task["index"])
    if task["do"] == "build":
        print(json.dumps(build(task["engine"], corpus, index, task["encoder"])))
    else:
        queries = read_questions(Path(task["questions"]), task["limit"])
        print(json.dumps(search(task["engine"], corpus, index, queries, task["topk"])))


def dense_reference(index: Path, queries: list[str], encoder: str) -> list[NDArray[np.float64]]:
    """1 + cosine with every vector of a flat index (positive, as `recall` wants scores)."""
    from rexrag.retrieval.rankers.encoder import Encoder

    vectors = np.load(index / "vectors.npy", mmap_mode="r")
    asked = Encoder(encoder).queries(queries)
    products = np.vstack([vectors[s : s + 100_000] @ asked.T for s in range(0, len(vectors), 100_000)])
    return [1.0 + products[:, i].astype(np.float64) for i in range(len(queries))]


def compare(corpus: Path, questions: Path, args: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    engines = [*ENGINES, *(DENSE if args.encoder else ())]
    if not args.engines and not find_spec("seismic"):
        engines.remove("seismic")
    if args.engines:
        engines = [engine for engine in engines if engine in args.engines.split(",")]
    rows: dict[str, dict[str, Any]] = {}
    tasks: dict[str, dict[str, Any]] = {}
    for engine in engines:
        slow = engine == "rank_bm25"
        tasks[engine] = {
            "engine": engine, "corpus": str(corpus), "index": str(work / engine), "questions": str(questions),
            "limit": args.slow_queries if slow else args.queries, "topk": args.topk, "encoder": args.encoder,
        }  # fmt: skip
        rows[engine] = child({**tasks[engine], "do": "build"})
        print(f"  {engine}: built in {rows[engine]['build_s']:.1f} s", file=sys.stderr, flush=True)
    rounds: dict[str, list[dict[str, Any]]] = {engine: [] for engine in engines}
    for number in range(args.rounds):
        for engine in engines:
            if engine != "rank_bm25" or number == 0:
                rounds[engine].append(child({**tasks[engine], "do": "search"}))
    queries = read_questions(questions, args.queries)
    exact = exact_bm25(corpus, queries, BM25Options()) if set(engines) & set(ENGINES) else []
    near = dense_reference(work / "flat", queries, args.encoder) if "flat" in engines else []
    for engine in engines:
        for name in ("open_s", "queries_s", "resident_mb"):
            rows[engine][name] = statistics.median(found[name] for found in rounds[engine])
        found = rounds[engine][0]["found"]
        reference = near if engine in DENSE else exact
        rows[engine]["recall"] = recall(found, reference[: len(found)], args.topk) if reference else math.nan
    return [{"engine": engine, **row} for engine, row in rows.items()]


def show(title: str, rows: list[dict[str, Any]], topk: int) -> None:
    print(f"\n{title}")
    names = ("build_s", "build_peak_mb", "disk_mb", "open_s", "resident_mb", "queries_s", "recall")
    heads = ("build s", "peak MB", "disk MB", "open s", "resident MB", "queries/s", f"recall@{topk}")
    print(f"{'engine':12}" + "".join(f"{head:>13}" for head in heads))
    for row in rows:
        cells = [
            f"{row[name]:13,.3f}" if name in ("open_s", "recall") else f"{row[name]:13,.1f}" for name in names
        ]
        print(f"{row['engine']:12}" + "".join(cells))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="12000,200000,1000000")
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--questions", type=Path)
    parser.add_argument("--grow", type=int, default=0, help="make a corpus of your own this large")
    parser.add_argument(
        "--encoder", default="", help="a sentence-transformers folder: measures dense search too"
    )
    parser.add_argument("--engines", default="", help="only these, separated by commas")
    parser.add_argument("--queries", type=int, default=640)
    parser.add_argument("--slow-queries", type=int, default=16, help="for rank_bm25")
    parser.add_argument("--topk", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, help="folder for corpora; kept. Default: a temporary one")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return run_child(json.loads(args.child))
    if (args.corpus is None) != (args.questions is None):
        parser.error("--corpus and --questions go together")
    report: dict[str, Any] = {"machine": f"{os.cpu_count()} cores, {platform.platform()}", "tables": {}}
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        sizes = [0] if args.corpus else [int(size) for size in args.sizes.split(",")]
        for size in sizes:
            corpus, questions = (args.corpus, args.questions) if args.corpus else make_corpus(work, size)
            if args.grow:
                corpus = grow(work, corpus, args.grow)
            with tempfile.TemporaryDirectory(dir=work) as indexes:
                rows = compare(corpus, questions, args, Path(indexes))
            title = str(args.corpus) if args.corpus else f"fictional world, {size:,} passages"
            title += f", grown to {args.grow:,} passages" if args.grow else ""
            show(title, rows, args.topk)
            report["tables"][title] = rows
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
