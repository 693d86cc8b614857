"""What a request must pass before the service works for it: host, token, length, and a body in time.

A stranger is refused by the head alone. Bodies are read here, with a deadline and a bound on all of them
together, so that slow or large ones hold neither a search nor the memory.
"""

from __future__ import annotations

import asyncio
import hmac
import time

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rexrag.http import is_loopback
from rexrag.retrieval.http.metrics import Metrics

BODY_SECONDS = 20.0
"""For the whole body of a request."""
BODIES_BYTES = 64 * 2**20
"""Of all bodies that are held at one time."""
CLIENT_LEFT = 499
"""Status of a request whose client left before it was answered; only /metrics shows it."""
OPEN_PATHS = frozenset({"/health"})
"""Answered without a token."""


class Bodies:
    """Reads the bodies of requests and knows how much of them is held."""

    def __init__(self) -> None:
        self._held = 0
        self._reading: set[asyncio.Timeout] = set()
        self._stopped = False

    async def read(self, receive: Receive) -> bytes | Response | None:
        """The body, or what to answer instead; None where the client has left. `free` what is returned."""
        body = bytearray()
        try:
            async with asyncio.timeout(0.0 if self._stopped else BODY_SECONDS) as timeout:
                self._reading.add(timeout)
                try:
                    more = True
                    while more:
                        message = await receive()
                        if message["type"] == "http.disconnect":
                            return None
                        body += message.get("body", b"")
                        more = message.get("more_body", False)
                        if self._held + len(body) > BODIES_BYTES:
                            return refusal(429, "too many large requests at once", {"Retry-After": "1"})
                finally:
                    self._reading.discard(timeout)
        except TimeoutError:
            if self._stopped:
                return refusal(503, "the service is stopping")
            return refusal(408, f"the body was not whole after {BODY_SECONDS:g} s")
        self._held += len(body)
        return bytes(body)

    def free(self, body: bytes) -> None:
        self._held -= len(body)

    def stop(self) -> None:
        """Wait for no more bodies: requests that are not whole are told that the service stops."""
        self._stopped = True
        for timeout in self._reading:
            timeout.reschedule(0.0)


class Guard:
    """The outermost layer of the service, in plain ASGI; it counts the requests to /retrieve too.

    host: the address that the service listens on. On loopback a request must name this machine in its Host
    header: a web page whose name was made to point here (DNS rebinding) cannot.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        host: str,
        token: str | None,
        body_bytes: int,
        bodies: Bodies,
        metrics: Metrics,
    ) -> None:
        self.app, self.host, self.token = app, host, token
        self.body_bytes, self.bodies, self.metrics = body_bytes, bodies, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        begun, status = time.perf_counter(), CLIENT_LEFT

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._pass(scope, receive, noted)
        finally:
            if scope["path"].rstrip("/") == "/retrieve":
                self.metrics.requests.labels(str(status)).inc()
                self.metrics.request_seconds.observe(time.perf_counter() - begun)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        refused = self._refuse_head(request)
        if refused is not None or request.method != "POST":
            return await (refused or self.app)(scope, receive, send)
        body = await self.bodies.read(receive)
        if body is None:
            return None
        if isinstance(body, Response):
            return await body(scope, receive, send)
        try:
            await self.app(scope, _after(body, receive), send)
        finally:
            self.bodies.free(body)

    def _refuse_head(self, request: Request) -> Response | None:
        if is_loopback(self.host) and not _names_loopback(request.headers.get("host")):
            return refusal(421, "this service answers to localhost and loopback addresses only")
        given = request.headers.get("authorization", "")
        # Not request.url.path: older Starlettes make it from the Host header, which the client writes.
        guarded = self.token and request.scope["path"] not in OPEN_PATHS
        if guarded and not hmac.compare_digest(given.encode(), f"Bearer {self.token}".encode()):
            return refusal(401, "expected the service's bearer token", {"WWW-Authenticate": "Bearer"})
        if request.method != "POST":
            return None
        length = request.headers.get("content-length", "")
        if not length.isdecimal():
            return refusal(411, "expected a Content-Length")
        if int(length) > self.body_bytes:
            return refusal(413, f"body of {length} bytes, at most {self.body_bytes} are taken")
        return None


def refusal(status: int, detail: str, headers: dict[str, str] | None = None) -> Response:
    """An error as JSON, one line."""
    return JSONResponse({"detail": detail}, status, headers)


def _names_loopback(header: str | None) -> bool:
    """Whether a Host header (name or address, with or without a port) is this machine's; none is."""
    if not header:
        return True  # HTTP/1.0; a browser always sends one
    host = header.rpartition(":")[0] if not header.endswith("]") and ":" in header else header
    return is_loopback(host)


def _after(body: bytes, receive: Receive) -> Receive:
    """What the application receives: the body, then whatever the connection says."""
    whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return whole.pop() if whole else await receive()

    return again
