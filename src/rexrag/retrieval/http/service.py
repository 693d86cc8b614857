"""A retriever behind HTTP, speaking Search-R1's protocol.

    POST /retrieve  {"queries": ["…"], "topk": 3, "return_scores": true}
                    -> {"result": [[{"document": {"id": "…", "contents": "…"}, "score": 1.5}, …], …]}
                    `return_scores` false (the default): bare documents instead of document and score
    GET  /health    {"status": "ok", "digest": "…"}
    GET  /metrics   Prometheus text

Errors are `{"detail": "one line"}`: 401 no or wrong token, 411 and 413 body length, 422 anything else about
the request, 429 with Retry-After where too many queries wait, 502 a service behind this one failed.
"""

from __future__ import annotations

import hmac
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rexrag.errors import ConfigError, RetrievalError
from rexrag.http import TOKEN_VARIABLE, is_loopback
from rexrag.retrieval.base import Retriever
from rexrag.retrieval.http.batching import Batcher, Overloaded
from rexrag.retrieval.http.metrics import Metrics
from rexrag.retrieval.index.folder import load_index
from rexrag.types import Document

LAST_SECONDS = 30
"""How long a service that was told to stop finishes what it has begun."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may ask for, and what all of them together."""

    queries: int = 1024
    query_characters: int = 32_768
    topk: int = 100
    body_bytes: int = 32 * 2**20
    batch: int = 256
    """Queries searched together."""
    waiting: int = 4096
    """Queries that may wait for a search; a request that comes on top is told to come back."""
    cache: int = 50_000
    """Passages kept in the cache of answers; 0 keeps none."""


class RetrieveRequest(BaseModel):
    """Body of `POST /retrieve`."""

    queries: list[str]
    topk: int | None = None
    return_scores: bool = False


def create_app(
    retriever: Retriever, *, default_topk: int = 3, token: str | None = None, limits: Limits | None = None
) -> FastAPI:
    """The service as an ASGI application. With a `token`, all but `/health` wants it as a bearer token."""
    limits = limits or Limits()
    metrics = Metrics()
    batcher = Batcher(retriever, metrics, batch=limits.batch, waiting=limits.waiting, cache=limits.cache)
    app = FastAPI(title="rexrag retriever", docs_url=None, redoc_url=None, openapi_url=None)

    app.add_middleware(Guard, token=token, body_bytes=limits.body_bytes, metrics=metrics)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return _refusal(422, f"{where}: {first['msg']}")

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "digest": retriever.digest}

    @app.get("/metrics")
    async def counted() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    # The search itself runs in a thread, so /health answers meanwhile.
    @app.post("/retrieve")
    async def retrieve(request: RetrieveRequest) -> Response:
        topk = default_topk if request.topk is None else request.topk
        problem = _limit_broken(request.queries, topk, limits)
        if problem:
            return _refusal(422, problem)
        try:
            found = await batcher.search(request.queries, topk)
        except Overloaded as error:
            return _refusal(429, str(error), {"Retry-After": str(error.seconds)})
        except RetrievalError as error:
            return _refusal(502, str(error))
        metrics.queries.inc(len(found))
        render = _with_score if request.return_scores else _bare
        return JSONResponse({"result": [[render(document) for document in documents] for documents in found]})

    return app


class Guard:
    """Refuses before the body is read, so that a stranger cannot make the service hold one; counts the rest.

    Plain ASGI: Starlette's `BaseHTTPMiddleware` adds a task and two streams to every request.
    """

    def __init__(self, app: ASGIApp, token: str | None, body_bytes: int, metrics: Metrics) -> None:
        self.app, self.token, self.body_bytes, self.metrics = app, token, body_bytes, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        begun, status = time.perf_counter(), 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        request = Request(scope)
        try:
            await (_refuse_head(request, self.token, self.body_bytes) or self.app)(scope, receive, noted)
        finally:
            if scope["path"] == "/retrieve":
                self.metrics.requests.labels(str(status)).inc()
                self.metrics.request_seconds.observe(time.perf_counter() - begun)


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

    Requests that are being answered then are finished first, for up to LAST_SECONDS. `ready` is told the
    address and the number of passages once the index is open. Raises ConfigError where `host` can be reached
    from other machines and there is no token, or where the address cannot be had; IndexFolderError where the
    index cannot be opened.
    """
    token = token or os.environ.get(TOKEN_VARIABLE) or None
    check_exposure(host, token)
    # The address first: a port that is taken should not be found after a long load.
    with listen(host, port) as listening, suppress(KeyboardInterrupt):
        retriever = load_index(index_folder, encoder=encoder)
        app = create_app(retriever, default_topk=default_topk, token=token, limits=limits)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=LAST_SECONDS)
        if ready is not None:
            shown = f"[{host}]" if ":" in host else host
            ready(f"http://{shown}:{listening.getsockname()[1]}", len(retriever.documents))
        uvicorn.Server(config).run(sockets=[listening])


def check_exposure(host: str, token: str | None) -> None:
    """Raises ConfigError where a service on `host` would be open to other machines."""
    if not is_loopback(host) and not token:
        raise ConfigError(
            f"host '{host}' can be reached from other machines; set a bearer token in ${TOKEN_VARIABLE}, "
            "or use 127.0.0.1"
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


def _refuse_head(request: Request, token: str | None, body_bytes: int) -> Response | None:
    given = request.headers.get("authorization", "")
    # Not request.url.path: older Starlettes make it from the Host header, which the client writes.
    guarded = token and request.scope["path"] != "/health"
    if guarded and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
        return _refusal(401, "expected the service's bearer token", {"WWW-Authenticate": "Bearer"})
    if request.method != "POST":
        return None
    length = request.headers.get("content-length", "")
    if not length.isdecimal():
        return _refusal(411, "expected a Content-Length")
    if int(length) > body_bytes:
        return _refusal(413, f"body of {length} bytes, at most {body_bytes} are taken")
    return None


def _limit_broken(queries: list[str], topk: int, limits: Limits) -> str:
    if len(queries) > limits.queries:
        return f"queries: {len(queries)} given, at most {limits.queries} are taken"
    if not 1 <= topk <= limits.topk:
        return f"topk: {topk} given, expected 1 to {limits.topk}"
    for i, query in enumerate(queries):
        if len(query) > limits.query_characters:
            return f"queries.{i}: {len(query)} characters, at most {limits.query_characters} are taken"
    return ""


def _refusal(status: int, detail: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"detail": detail}, status, headers)


def _bare(document: Document) -> dict[str, Any]:
    return {"id": document.id, "contents": document.contents}


def _with_score(document: Document) -> dict[str, Any]:
    return {"document": _bare(document), "score": document.score}
