"""What every HTTP client and service here shares: addresses, retries, and a client with limits.

A peer may be slow, broken or hostile. `Client` bounds the time of a whole request and the bytes of its
answer, follows a redirect only to where it already talks to, and reads no compressed answer.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import random
import threading
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from rexrag.errors import ConfigError
from rexrag.io import printable

TOKEN_VARIABLE = "REXRAG_RETRIEVER_TOKEN"
"""Environment variable with the bearer token. Not in the configuration, which is copied into run folders."""
FIRST_PAUSE = 0.5
"""Seconds before the first retry; doubled for each further one."""
LONGEST_PAUSE = 30.0
"""Seconds; also the most that a Retry-After header can ask for."""
MOST_REDIRECTS = 3
FIRST_WORDS = 120
"""Characters of an answer that an error message quotes."""
PROXY_VARIABLES = ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")


class BadAnswer(Exception):
    """The peer answered, and the answer cannot be used: too long, compressed, or a redirect elsewhere."""


def is_loopback(host: str) -> bool:
    """Whether a host name or address can be this machine only."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def parse_address(url: str, name: str, variable: str, example: str) -> httpx.URL:
    """An http or https address. `name` is what errors call it, `variable` where its token belongs.

    Raises ConfigError for anything else and for a secret in the address, which would reach the run folder.
    """
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ConfigError(f"{name} '{url}': {error}") from None
    if parsed.userinfo:
        raise ConfigError(f"{name} of host '{parsed.host}': a secret belongs in ${variable}")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError(f"{name} '{url}': expected for example {example}")
    return parsed


def pause(attempt: int, asked: float | None, jitter: random.Random) -> float:
    """Seconds to wait after failed attempt 0, 1, …: doubling, times 0.5 to 1; more where the server asks."""
    doubled = FIRST_PAUSE * 2.0 ** min(attempt, 30) * (0.5 + 0.5 * jitter.random())
    return min(max(doubled, asked or 0.0), LONGEST_PAUSE)


def may_pass(response: httpx.Response) -> bool:
    """Whether the same request can succeed later: the server is busy or broken."""
    return response.status_code == 429 or response.is_server_error


def retry_after(header: str | None, now: Callable[[], float] = time.time) -> float | None:
    """Seconds from a Retry-After header (a number of seconds or an HTTP date); None where it says nothing."""
    if not header:
        return None
    if header.strip().isdecimal():
        return float(header)
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - now())
    except ValueError:
        return None


def first_words(response: httpx.Response) -> str:
    """The beginning of an answer on one line, for an error message."""
    text = response.content[: 4 * FIRST_WORDS].decode("utf-8", "replace")
    shown = " ".join(printable(text).split())
    return shown if len(shown) <= FIRST_WORDS else f"{shown[:FIRST_WORDS]}…"


def parse_json(response: httpx.Response) -> Any:
    """The JSON of an answer. Raises ValueError that quotes the first words of anything else."""
    try:
        return json.loads(response.content)
    except (ValueError, RecursionError):
        kind = printable(response.headers.get("Content-Type", "no content type"))[:60]
        raise ValueError(f"expected JSON, got {kind}: '{first_words(response)}'") from None


class Client:
    """Requests with limits, from any thread. Close it at the end.

    timeout: seconds for one whole request, from the name look-up to the last byte of the answer.

    httpx bounds each read alone, so a peer that sends a byte now and then would never time out. Requests
    therefore run on an event loop, where a deadline can end them at any point: one loop in one thread for all
    clients of a process.
    """

    def __init__(self, host: str, *, timeout: float, token: str | None = None, transport: Any = None) -> None:
        """`transport` is httpx's, for tests. Raises ConfigError where the proxy settings are unusable."""
        self.timeout = timeout
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {token}"} if token else {})
        try:
            self._http = httpx.AsyncClient(
                timeout=None,
                headers=headers,
                transport=transport,
                # A proxy cannot reach this machine's own loopback.
                trust_env=not is_loopback(host),
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            )
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            raise ConfigError(f"{_proxy_settings()}: not usable for '{host}': {error}") from None

    def request(
        self, method: str, url: httpx.URL | str, *, body: object = None, most_bytes: int
    ) -> httpx.Response:
        """One request, with `body` as JSON; the answer has at most `most_bytes` bytes and is read whole.

        Raises httpx.TransportError (nobody there, cut off, out of time) and BadAnswer.
        """
        work = self._exchange(method, httpx.URL(url), body, most_bytes)
        future = asyncio.run_coroutine_threadsafe(work, background_loop())
        try:
            return future.result()
        finally:
            future.cancel()  # of use where Ctrl-C interrupts the wait

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._http.aclose(), background_loop()).result()

    async def _exchange(self, method: str, url: httpx.URL, body: object, most_bytes: int) -> httpx.Response:
        try:
            async with asyncio.timeout(self.timeout):
                for _ in range(MOST_REDIRECTS + 1):
                    response = await self._send(method, url, body, most_bytes)
                    there = _redirect(url, response)
                    if there is None:
                        return response
                    url = there
                raise BadAnswer(f"{MOST_REDIRECTS + 1} redirects in a row, the last to {url}")
        except TimeoutError:
            raise httpx.ReadTimeout(f"no whole answer within {self.timeout:g} s") from None

    async def _send(self, method: str, url: httpx.URL, body: object, most_bytes: int) -> httpx.Response:
        request = self._http.build_request(method, url, json=body)
        response = await self._http.send(request, stream=True)
        try:
            encoding = response.headers.get("Content-Encoding", "identity").lower()
            if encoding not in ("", "identity"):
                raise BadAnswer(f"the answer is compressed ({encoding[:20]}), although none was asked for")
            content = bytearray()
            async for piece in response.aiter_bytes():  # as they came: compressed answers are refused above
                content += piece
                if len(content) > most_bytes:
                    raise BadAnswer(f"the answer is longer than {most_bytes:,} bytes")
        finally:
            await response.aclose()
        return httpx.Response(
            response.status_code, headers=response.headers, content=bytes(content), request=request
        )


_running: dict[int, asyncio.AbstractEventLoop] = {}
"""The event loop of this process, by its id: a forked child has the parent's loop, but not its thread."""
_starting = threading.Lock()


def background_loop() -> asyncio.AbstractEventLoop:
    """The event loop that runs in a thread of this process; it is started by the first call."""
    with _starting:
        found = _running.get(os.getpid())
        if found is None:
            found = _running[os.getpid()] = asyncio.new_event_loop()
            threading.Thread(target=found.run_forever, name="http-client", daemon=True).start()
        return found


def _redirect(url: httpx.URL, response: httpx.Response) -> httpx.URL | None:
    """Where an answer sends the same request; None where it is no redirect. Raises BadAnswer for elsewhere.

    Only 307 and 308 keep a POST what it is; the token and the queries go to no other host.
    """
    location = response.headers.get("Location")
    if not response.has_redirect_location or not location:
        return None
    try:
        there = url.join(location)
    except (httpx.InvalidURL, ValueError):
        raise BadAnswer(f"status {response.status_code}: redirects to no address") from None
    same = (there.scheme, there.host, there.port) == (url.scheme, url.host, url.port)
    if same and response.status_code in (307, 308):
        return there
    raise BadAnswer(f"status {response.status_code}: redirects to {printable(str(there))}; give that address")


def _proxy_settings() -> str:
    """The names of the variables that are set; their values may hold a password."""
    names = [name for name in PROXY_VARIABLES if os.environ.get(name) or os.environ.get(name.lower())]
    return f"the proxy setting of {', '.join(f'${name}' for name in names)}" if names else "the HTTP client"
