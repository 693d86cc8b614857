"""Searching a corpus: in this process, or by a Search-R1 `/retrieve` service, here or elsewhere.

| module | what |
|---|---|
| `base` | the `Retriever` protocol, and a retriever made of a ranker and the documents that it ranks |
| `corpus` | reading `corpus.jsonl`; the digest of a corpus |
| `batching` | queries of many callers searched together |
| `rankers/` | BM25, vectors, and both fused |
| `index/` | index folders: built, opened, checked |
| `http/` | the `/retrieve` service and its client |
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rexrag.config.schema import RetrieverConfig
from rexrag.errors import ConfigError, RetrievalError
from rexrag.retrieval.base import Retriever
from rexrag.types import Document

__all__ = ["Retriever", "check_service", "make_retriever"]


def check_service(config: RetrieverConfig) -> None:
    """Does the service at `config.url` answer a search? One short try: a run must not wait for it.

    Raises ConfigError.
    """
    import httpx

    from rexrag.retrieval.http.client import RemoteRetriever

    try:
        with RemoteRetriever(config.url, timeout=min(config.timeout, 10.0), retries=1) as retriever:
            retriever.search(["test"], 1)
    except (RetrievalError, httpx.HTTPError) as error:
        raise ConfigError(f"retriever.url = '{config.url}' does not answer: {error}") from None


def make_retriever(
    config: RetrieverConfig, corpus: Iterable[Document] | str | Path | None = None
) -> Retriever:
    """The retriever that a configuration asks for, over documents or a `corpus.jsonl`.

    A saved index needs no corpus; where one is given too, it must be the one the index was built from.
    The imports are here because the agent needs this package for its types only.
    Raises ConfigError, DataError (corpus) or IndexFolderError.
    """
    if config.kind == "remote":
        from rexrag.retrieval.http.client import RemoteRetriever

        if not config.url:
            raise ConfigError("retriever.url is empty; retriever.kind = 'remote' needs a /retrieve address")
        return RemoteRetriever(config.url, timeout=config.timeout, retries=config.retries)

    if config.kind == "plugin":
        from rexrag.retrieval.plugin import load_retriever

        if not config.plugin:
            raise ConfigError("retriever.plugin is empty; retriever.kind = 'plugin' needs 'module:name'")
        return load_retriever(config.plugin)

    if config.url:
        raise ConfigError(
            f"retriever.url = '{config.url}', but retriever.kind = '{config.kind}' does not use it; "
            "set retriever.kind = 'remote', or leave the address out"
        )
    from rexrag.retrieval.corpus import documents_digest, read_corpus
    from rexrag.retrieval.index.folder import load_index, read_manifest
    from rexrag.retrieval.rankers.bm25 import BM25Retriever

    # An empty path is how a config file says "none".
    given = None if isinstance(corpus, str) and not corpus else corpus
    documents = read_corpus(given) if isinstance(given, str | Path) else given
    if config.index:
        built = read_manifest(config.index)["kind"]
        if built != config.kind:
            raise ConfigError(
                f"retriever.kind is '{config.kind}', but {config.index} is a '{built}' index; "
                f"set retriever.kind = '{built}'"
            )
        digest = documents_digest(documents) if documents is not None else None
        return load_index(config.index, digest, encoder=config.encoder)
    if documents is None:
        raise ConfigError("retriever.index and data.corpus are both empty; one of them must be given")
    if config.kind != "bm25":
        raise ConfigError(
            f"retriever.kind = '{config.kind}' needs retriever.index; "
            f"build one with: rexrag index build CORPUS --out DIR --kind {config.kind}"
        )
    return BM25Retriever.build(documents)
