"""`rexrag index build`, `index check`, `retrieve`, `serve`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rexrag.cli.training import JsonOption
from rexrag.errors import ConfigError
from rexrag.io import printable

if TYPE_CHECKING:
    from rexrag.retrieval.index.estimate import Estimate

index_app = typer.Typer(help="Build and check retrieval indexes.", no_args_is_help=True)
EncoderOption = Annotated[str, typer.Option(help="A sentence-transformers folder or hub id (dense, hybrid).")]


def register(app: typer.Typer) -> None:
    for command in (retrieve, serve):
        app.command()(command)
    app.add_typer(index_app, name="index")


def retrieve(
    query: Annotated[list[str], typer.Argument(help="Queries.")],
    index: Annotated[Path | None, typer.Option(help="An index folder of any kind.")] = None,
    corpus: Annotated[Path | None, typer.Option(help="Or a corpus.jsonl (BM25 in memory).")] = None,
    url: Annotated[str, typer.Option(help="Or a /retrieve service.")] = "",
    encoder: EncoderOption = "",
    topk: Annotated[int, typer.Option("-k", "--topk", help="Passages for each query.", min=1)] = 3,
    as_json: JsonOption = False,
) -> None:
    """Search a corpus.

    \b
    Examples:
      rexrag retrieve "capital of France" --index indexes/wiki -k 5
      rexrag retrieve "capital of France" "largest moon" --corpus corpus.jsonl
      rexrag retrieve "capital of France" --url http://127.0.0.1:8000
    """
    from rexrag.config.schema import RetrieverConfig
    from rexrag.retrieval import make_retriever
    from rexrag.retrieval.index.folder import read_manifest

    if sum(map(bool, (index, corpus, url))) != 1:
        raise ConfigError("expected exactly one of --index, --corpus and --url")
    kind: Any = "remote" if url else read_manifest(index)["kind"] if index else "bm25"
    config = RetrieverConfig(kind=kind, url=url, index=str(index or ""), encoder=encoder)
    found = make_retriever(config, corpus).search(query, topk)
    if as_json:
        print(json.dumps([[asdict(document) for document in documents] for documents in found]))
        return
    for words, documents in zip(query, found, strict=True):
        print(f"query: {words}")
        for place, document in enumerate(documents, 1):
            text = " ".join(document.text.split())[:160]
            print(printable(f"{place:3}  {document.score:7.3f}  [{document.id}] {document.title}: {text}"))


FEWEST_FOUND = 0.9
MISSES = (
    "bm25-fast misses more than a tenth of the best passages here, as words of this corpus are in too many "
    "of them; bm25-disk misses next to none"
)


@index_app.command("build")
def index_build(
    corpus: Annotated[
        Path, typer.Argument(help="corpus.jsonl, compressed or not: id, contents (or title, text).")
    ],
    out: Annotated[Path, typer.Option(help="Index folder to write.")],
    kind: Annotated[
        str, typer.Option(help="bm25 (up to 200,000 passages), bm25-disk, bm25-fast, dense, hybrid.")
    ] = "bm25",
    encoder: EncoderOption = "",
    ann: Annotated[str, typer.Option(help="Vector search: flat (exact), hnsw, ivf-pq.")] = "flat",
    lexical: Annotated[str, typer.Option(help="hybrid: the kind of its BM25 part.")] = "bm25-disk",
    query_prefix: Annotated[
        str | None, typer.Option(help="Text before each query; default: as the encoder was trained.")
    ] = None,
    passage_prefix: Annotated[
        str | None, typer.Option(help="Text before each passage; the same default.")
    ] = None,
    effort: Annotated[
        int, typer.Option(min=0, help="hnsw efSearch, ivf-pq lists probed; 0: the default for the size.")
    ] = 0,
    k1: Annotated[
        float, typer.Option(help="bm25, bm25-fast: BM25's k1, the saturation of repeated words.")
    ] = 1.2,
    b: Annotated[float, typer.Option(help="bm25, bm25-fast: BM25's b, the weight of length, 0 to 1.")] = 0.75,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what the build needs; build nothing.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Delete an unfinished build and begin again.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Build an index. After a kill the same command continues.

    \b
    Examples:
      rexrag index build corpus.jsonl --out indexes/wiki
      rexrag index build wiki18.jsonl --out indexes/wiki18 --kind bm25-disk --dry-run
      rexrag index build corpus.jsonl --out indexes/fast --kind bm25-fast
      rexrag index build corpus.jsonl --out indexes/e5 --kind dense --encoder intfloat/e5-base-v2 --ann hnsw
      rexrag index build corpus.jsonl --out indexes/both --kind hybrid --encoder intfloat/e5-base-v2
    """
    import time

    from rich.console import Console

    from rexrag.cli.display import BuildProgress
    from rexrag.retrieval.index.build import BuildOptions, build_index
    from rexrag.retrieval.index.estimate import estimate
    from rexrag.retrieval.index.folder import refuse_other_folder
    from rexrag.retrieval.rankers.bm25 import BM25Options

    options = BuildOptions(
        kind=kind,
        lexical=lexical,
        bm25=BM25Options(k1=k1, b=b),
        encoder=encoder,
        query_prefix=query_prefix,
        passage_prefix=passage_prefix,
        dense={"ann": ann, "effort": effort} if kind in ("dense", "hybrid") else {},
    )
    refuse_other_folder(out)
    needs = estimate(corpus, out, options)
    # Progress goes to stderr, so that --json leaves stdout to the answer.
    console = Console(stderr=True, highlight=False)
    console.soft_wrap = not console.is_terminal  # a log keeps lines whole, a terminal breaks them at words
    for line in _needs(corpus, needs):
        console.print(line, markup=False)
    if dry_run:
        if as_json:
            print(json.dumps(asdict(needs)))
        return
    start = time.perf_counter()
    with BuildProgress(console) as progress:
        facts = build_index(corpus, out, options, progress, documents=needs.documents, restart=restart)
    facts["seconds"] = round(time.perf_counter() - start, 2)
    if facts.get("recall", 1.0) < FEWEST_FOUND:
        console.print(f"warning: {MISSES}", markup=False)
    print(json.dumps({**facts, "kind": kind, "out": str(out)}) if as_json else _built(out, facts))


def _needs(corpus: Path, needs: Estimate) -> list[str]:
    """What a build will need, and what speaks against it, in lines."""
    from rexrag.retrieval.index.estimate import size_text

    scratch = f" (and {size_text(needs.scratch)} while it is built)" if needs.scratch else ""
    return [
        f"{corpus}: about {needs.documents:,} passages. Will need about {size_text(needs.disk)} of disk"
        f"{scratch}, {size_text(needs.free_disk)} are free.",
        *(f"warning: {warning}" for warning in needs.warnings),
    ]


def _built(out: Path, facts: dict[str, Any]) -> str:
    from rexrag.retrieval.index.estimate import size_text

    size = size_text(facts["bytes"])
    done = f"{facts['documents']:,} documents indexed in {facts['seconds']} s, {size}: {out}"
    if "recall" not in facts:
        return done
    return f"{done}; finds {facts['recall']:.3f} of the ten best passages (64 sampled queries)"


@index_app.command("check")
def index_check(
    index: Annotated[Path, typer.Argument(help="An index folder of any kind.")],
    as_json: JsonOption = False,
) -> None:
    """Compare every byte of an index with its checksums. Exit code 2 if one differs.

    \b
    Examples:
      rexrag index check indexes/wiki
    """
    from rexrag.retrieval.index.estimate import size_text
    from rexrag.retrieval.index.folder import check_index

    facts = check_index(index)
    if as_json:
        print(json.dumps({**facts, "index": str(index)}))
        return
    size = size_text(facts["bytes"])
    print(f"{index}: whole: {facts['documents']:,} passages, {facts['files']} files, {size}")


def serve(
    index: Annotated[Path, typer.Argument(help="An index folder of any kind.")],
    host: Annotated[
        str, typer.Option(help="Any address but loopback needs REXRAG_RETRIEVER_TOKEN.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 chooses a free port.")] = 8000,
    encoder: EncoderOption = "",
    topk: Annotated[int, typer.Option(min=1, help="Passages for a request that gives no number.")] = 3,
    most_topk: Annotated[int, typer.Option(min=1, help="Passages for a query, at most.")] = 100,
    most_queries: Annotated[int, typer.Option(min=1, help="Queries in a request, at most.")] = 1024,
    most_waiting: Annotated[
        int, typer.Option(min=1, help="Queries that wait, at most; then status 429.")
    ] = 4096,
    batch: Annotated[int, typer.Option(min=1, help="Queries searched together.")] = 256,
    cache_mb: Annotated[int, typer.Option(min=0, help="Memory of the answer cache, MB; 0 is none.")] = 64,
    cache: Annotated[int | None, typer.Option(min=0, hidden=True)] = None,
) -> None:
    """Serve an index over Search-R1's /retrieve protocol, with /health and /metrics.

    \b
    Examples:
      rexrag serve indexes/wiki --port 8000
      REXRAG_RETRIEVER_TOKEN=… rexrag serve indexes/wiki --host 0.0.0.0
    """
    from rexrag.retrieval.http.service import Limits
    from rexrag.retrieval.http.service import serve as run

    def ready(address: str, passages: int) -> None:
        print(f"POST {address}/retrieve ({passages:,} passages; Ctrl-C stops)", flush=True)

    if cache is not None:
        print("--cache counted passages; it is now --cache-mb, in megabytes", file=sys.stderr)
        cache_mb = cache_mb if cache else 0
    limits = Limits(
        topk=most_topk,
        queries=most_queries,
        waiting=most_waiting,
        batch=batch,
        cache_bytes=cache_mb * 2**20,
    )
    run(index, host, port, default_topk=topk, limits=limits, encoder=encoder, ready=ready)
