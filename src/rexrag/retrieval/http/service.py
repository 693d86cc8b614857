"""A retriever behind HTTP, speaking Search-R1's protocol.

    POST /retrieve  {"queries": ["…"], "topk": 3, "return_scores": true}
                    -> {"result": [[{"document": {"id": "…", "contents": "…"}, "score": 1.5}, …], …]}
                    `return_scores` false (the default): bare documents instead of document and score
    GET  /health    {"status": "ok", "digest": "…"}
    GET  /metrics   Prometheus text

Errors are `{"detail": "one line"}`: 401 no or wrong token, 408 a body that takes too long, 411 and 413 body
length, 421 a Host header of another machine, 422 anything else about the request, 429 with Retry-After where
too much waits, 500 the search failed, 502 a service behind this one failed, 503 the service is stopping.

`guard` holds what a request must pass, `connections` what a connection may hold, `batching` who waits.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel

from rexrag.errors import ConfigError, RetrievalError
from rexrag.http import TOKEN_VARIABLE, is_loopback
from rexrag.retrieval.base import Retriever
from rexrag.retrieval.batching import BatchedSearch, Bounds, Overloaded, Stopped
from rexrag.retrieval.http.connections import LogLimit, Server
from rexrag.retrieval.http.guard import CLIENT_LEFT, Bodies, Guard, refusal
from rexrag.retrieval.http.metrics import Metrics
from rexrag.retrieval.index.folder import load_index
from rexrag.types import Document

log = logging.getLogger(__name__)
log.addFilter(LogLimit())

TOKEN_CHARACTERS, TOKEN_DIFFERENT = 16, 8
"""A token that guards a service off loopback has at least so many characters, so many of them different."""
RENDERED_TOGETHER = 32
"""Results turned into JSON between two looks at other requests."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may ask for, and what all of them together."""

    queries: int = 1024
    query_characters: int = 32_768
    characters: int = 2**20
    """Of all queries of a request."""
    topk: int = 100
    passages: int = 25_600
    """Queries times topk of a request."""
    body_bytes: int = 8 * 2**20
    batch: int = 256
    """Queries searched together."""
    waiting: int = 4096
    """Queries that may wait for a search; a request that comes on top is told to come back."""
    waiting_characters: int = 8 * 2**20
    cache_bytes: int = 64 * 2**20
    """Memory of the cache of answers; 0 keeps none."""

    @property
    def bounds(self) -> Bounds:
        """Those of the queries that wait."""
        return Bounds(
            batch=self.batch,
            waiting=self.waiting,
            waiting_characters=self.waiting_characters,
            cache_bytes=self.cache_bytes,
        )

    def broken_by(self, queries: Sequence[str], topk: int) -> str:
        """What a request asks for too much, in words; empty where it is within the limits."""
        if len(queries) > self.queries:
            return f"queries: {len(queries)} given, at most {self.queries} are taken"
        if not 1 <= topk <= self.topk:
            return f"topk: {topk} given, expected 1 to {self.topk}"
        if len(queries) * topk > self.passages:
            asked = f"{len(queries)} with topk {topk} are {len(queries) * topk} passages"
            return f"queries: {asked}, at most {self.passages} are given"
        for i, query in enumerate(queries):
            if len(query) > self.query_characters:
                return f"queries.{i}: {len(query)} characters, at most {self.query_characters} are taken"
        characters = sum(map(len, queries))
        if characters > self.characters:
            return f"queries: {characters} characters, at most {self.characters} are taken"
        return ""


class RetrieveRequest(BaseModel):
    """Body of `POST /retrieve`."""

    queries: list[str]
    topk: int | None = None
    return_scores: bool = False


def create_app(
    retriever: Retriever,
    *,
    default_topk: int = 3,
    token: str | None = None,
    limits: Limits | None = None,
    host: str = "127.0.0.1",
) -> FastAPI:
    """The service as an ASGI application for `connections.Server`, or for uvicorn as it is.

    With a `token`, all but `/health` wants it as a bearer token. `host` is the address that it is served on.
    `app.state.stop(seconds)` refuses what waits and ends searches after so many seconds.
    """
    limits = limits or Limits()
    metrics = Metrics()
    batched = BatchedSearch(retriever, limits.bounds, metrics)
    # Redirects would be made of the Host header, which the client writes.
    app = FastAPI(
        title="rexrag retriever", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    bodies = Bodies()
    app.add_middleware(
        Guard, host=host, token=token, body_bytes=limits.body_bytes, bodies=bodies, metrics=metrics
    )

    app.exception_handler(RequestValidationError)(_invalid)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "digest": retriever.digest}

    @app.get("/metrics")
    async def counted() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.post("/retrieve")
    @app.post("/retrieve/")
    async def retrieve(asked: RetrieveRequest, request: Request) -> Response:
        topk = default_topk if asked.topk is None else asked.topk
        problem = limits.broken_by(asked.queries, topk)
        if problem:
            return refusal(422, problem)
        found = await _answer(batched, request, asked.queries, topk)
        if isinstance(found, Response):
            return found
        metrics.queries.inc(len(found))
        try:
            return await _render(found, _with_score if asked.return_scores else _bare)
        except ValueError as error:  # a score that is not finite, half a surrogate pair
            return refusal(500, f"what was found is no JSON: {error}")

    def stop(seconds: float) -> None:
        bodies.stop()
        batched.stop(seconds)

    app.state.stop = stop
    return app


async def _invalid(request: Request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return refusal(422, f"{where}: {first['msg']}")


async def _answer(
    batched: BatchedSearch, request: Request, queries: list[str], topk: int
) -> list[list[Document]] | Response:
    """What is found, or why nothing is. A client that hangs up meanwhile takes its queries with it."""
    task, waits = asyncio.current_task(), True
    assert task is not None
    # After the body nothing but a hang-up comes.
    left = asyncio.ensure_future(request.receive())
    left.add_done_callback(lambda _: task.cancel() if waits else None)
    try:
        return await batched.search(queries, topk)
    except asyncio.CancelledError:
        if not left.done() or task.uncancel():
            raise  # another wants this request to end
        return Response(status_code=CLIENT_LEFT)
    except Overloaded as error:
        return refusal(429, str(error), {"Retry-After": str(error.seconds)})
    except Stopped:
        return refusal(503, "the service is stopping", {"Retry-After": "1"})
    except RetrievalError as error:
        return refusal(502, str(error))
    except Exception as error:
        log.warning("a search failed: %s: %s", type(error).__name__, error)
        return refusal(500, f"the search failed: {type(error).__name__}")
    finally:
        waits = False
        left.cancel()


async def _render(found: list[list[Document]], shown: Callable[[Document], dict[str, Any]]) -> Response:
    """The answer as JSON, made in pieces: other requests are heard in between."""
    pieces: list[str] = []
    for number, documents in enumerate(found):
        if number and number % RENDERED_TOGETHER == 0:
            await asyncio.sleep(0)
        rows = [shown(document) for document in documents]
        pieces.append(json.dumps(rows, ensure_ascii=False, allow_nan=False, separators=(",", ":")))
    return Response(f'{{"result":[{",".join(pieces)}]}}', media_type="application/json")


def serve(
    index_folder: str | Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    token: str | None = None,
    default_topk: int = 3,
    limits: Limits | None = None,
    encoder: str = "",
    ready: Callable[[str, int], None] | None = None,
) -> None:
    """Serve an index folder until interrupted or terminated. `token` falls back to $REXRAG_RETRIEVER_TOKEN.

    The search that is running then is finished, if it takes no longer than `connections.LAST_SECONDS`; what
    waits is refused. `ready` is told the address and the number of passages once the index is open. Raises
    ConfigError where `host` can be reached from other machines and there is no good token, or where the
    address cannot be had; IndexFolderError where the index cannot be opened.
    """
    token = token or os.environ.get(TOKEN_VARIABLE) or None
    check_exposure(host, token)
    # The address first: a port that is taken should not be found after a long load.
    with listen(host, port) as listening, suppress(KeyboardInterrupt):
        retriever = load_index(index_folder, encoder=encoder)
        app = create_app(retriever, default_topk=default_topk, token=token, limits=limits, host=host)
        server = Server(app)
        if ready is not None:
            shown = f"[{host}]" if ":" in host else host
            ready(f"http://{shown}:{listening.getsockname()[1]}", len(retriever.documents))
        server.run(sockets=[listening])


def check_exposure(host: str, token: str | None) -> None:
    """Raises ConfigError where a service on `host` would be open to other machines, or its token guessed."""
    if is_loopback(host):
        return
    advice = f"set a bearer token in ${TOKEN_VARIABLE} (for example: openssl rand -hex 24), or use 127.0.0.1"
    if not token:
        raise ConfigError(f"host '{host}' can be reached from other machines; {advice}")
    if len(token) < TOKEN_CHARACTERS or len(set(token)) < TOKEN_DIFFERENT:
        raise ConfigError(
            f"host '{host}' can be reached from other machines, and the token is easily guessed: expected at "
            f"least {TOKEN_CHARACTERS} characters, {TOKEN_DIFFERENT} of them different; {advice}"
        )


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises ConfigError."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"port is {port}; expected 0 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}, port {port}: {error}") from None
    # Inherited by every connection. asyncio sets it only on sockets that name their protocol, which this one
    # does not; without it an answer's body waits 40 ms for the acknowledgement of its header.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def _bare(document: Document) -> dict[str, Any]:
    return {"id": document.id, "contents": document.contents}


def _with_score(document: Document) -> dict[str, Any]:
    return {"document": _bare(document), "score": document.score}
