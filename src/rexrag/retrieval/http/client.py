"""A retriever elsewhere: the client of Search-R1's `/retrieve` protocol.

A search either answers every query or raises RetrievalError; it never turns a failure into "nothing found".
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import time
from collections.abc import Callable, Sequence
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any

import httpx

from rexrag.errors import ConfigError, RetrievalError
from rexrag.http import TOKEN_VARIABLE, is_loopback
from rexrag.io import brief
from rexrag.types import Document

FIRST_PAUSE = 0.5
"""Seconds before the first retry; doubled for each further one."""
LONGEST_PAUSE = 30.0
"""Seconds; also the most that a Retry-After header can ask for."""


class RemoteRetriever:
    """A `Retriever` over HTTP. Use it as a context manager, or call `close`.

    `url` is the address of the endpoint; `/retrieve` is added where it has no path. Tried again, up to
    `retries` times with growing, jittered pauses: no connection, a time-out, status 429 and 5xx. Any other
    status and an answer of the wrong shape fail at once. `timeout` is in seconds, for each wait of a request.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 30.0,
        retries: int = 5,
        batch: int = 256,
        token: str | None = None,
        sleep: Callable[[float], None] = time.sleep,
        jitter: random.Random | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """`token` falls back to $REXRAG_RETRIEVER_TOKEN. Raises ConfigError where `url` is unusable."""
        self.url = endpoint(url)
        self.retries = retries
        self.batch = batch
        self._sleep = sleep
        # Its own generator: a retry must not shift the random numbers of a run.
        self._jitter = jitter or random.Random()
        token = token or os.environ.get(TOKEN_VARIABLE)
        self._http = httpx.Client(
            timeout=timeout,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            transport=transport,
            # A proxy cannot reach this machine's own loopback.
            trust_env=not is_loopback(self.url.host),
        )

    @property
    def digest(self) -> str:
        """Identity of the address; what corpus stands behind it cannot be known from here."""
        return hashlib.sha256(f"remote {self.url}".encode()).hexdigest()

    def search(self, queries: Sequence[str], topk: int) -> list[list[Document]]:
        """At most `topk` documents a query, best first. Raises RetrievalError; ConfigError if topk < 1."""
        if topk < 1:
            raise ConfigError(f"topk is {topk}; expected at least 1")
        found: list[list[Document]] = []
        for start in range(0, len(queries), self.batch):
            part = queries[start : start + self.batch]
            answer = self._post(
                {"queries": [_valid(query) for query in part], "topk": topk, "return_scores": True}
            )
            try:
                found += parse_answer(answer, len(part), topk)
            except (ValueError, OverflowError, RecursionError) as error:
                raise RetrievalError(f"{self.url}: not a /retrieve answer: {error}") from None
        return found

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> RemoteRetriever:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _post(self, body: dict[str, Any]) -> httpx.Response:
        for attempt in range(self.retries + 1):
            asked = None
            try:
                response = self._http.post(self.url, json=body)
            except httpx.TransportError as error:
                cause = f"{type(error).__name__}: {error}"
            except httpx.HTTPError as error:
                raise RetrievalError(f"{self.url}: {type(error).__name__}: {error}") from None
            else:
                if response.is_success:
                    return response
                cause = f"status {response.status_code}: {response.text[:200].strip()}"
                if not may_pass(response):
                    raise RetrievalError(f"{self.url}: {cause}", refused=True)
                asked = retry_after(response.headers.get("Retry-After"))
            if attempt < self.retries:
                self._sleep(pause(attempt, asked, self._jitter))
        raise RetrievalError(f"{self.url}: failed {self.retries + 1} times, the last time with {cause}")


def endpoint(url: str) -> httpx.URL:
    """The address that is posted to. Raises ConfigError."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ConfigError(f"retriever url '{url}': {error}") from None
    if parsed.userinfo:
        # The address is written into the run folder, so it must hold no secret.
        raise ConfigError(f"retriever url of host '{parsed.host}': a secret belongs in ${TOKEN_VARIABLE}")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError(f"retriever url '{url}': expected for example http://127.0.0.1:8000/retrieve")
    return parsed.copy_with(path="/retrieve") if parsed.path in ("", "/") else parsed


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


def parse_answer(response: httpx.Response, queries: int, topk: int) -> list[list[Document]]:
    """Documents from `{"result": [[{"document": {…}, "score": …}, …], …]}`. Raises ValueError.

    `id` and `score` may be missing: Search-R1's web search services send neither. A missing id is made
    from the contents.
    """
    body = response.json()
    result = body.get("result") if isinstance(body, dict) else None
    if not isinstance(result, list):
        raise ValueError(f"expected an object with a list 'result', got {brief(body)}")
    if len(result) != queries:
        raise ValueError(f"{queries} queries, but {len(result)} results")
    for i, documents in enumerate(result):
        if not isinstance(documents, list):
            raise ValueError(f"result.{i}: expected a list of documents, got {brief(documents)}")
    return [
        [_document(entry, f"result.{i}.{j}") for j, entry in enumerate(documents[:topk])]
        for i, documents in enumerate(result)
    ]


def _valid(text: str) -> str:
    """Without lone surrogates: a model can decode to them and JSON can spell them, but UTF-8 cannot."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _document(entry: object, where: str) -> Document:
    inner = entry.get("document") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(inner, dict):
        raise ValueError(f"{where}: expected an object with an object 'document', got {brief(entry)}")
    contents = inner.get("contents")
    if not isinstance(contents, str):
        raise ValueError(f"{where}.document.contents: expected a text, got {brief(contents)}")
    contents = _valid(contents)
    name = inner.get("id")
    if name is None:
        name = hashlib.sha256(contents.encode()).hexdigest()[:16]
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise ValueError(f"{where}.document.id: expected a text or a whole number, got {brief(name)}")
    score = entry.get("score", 0.0)
    if not isinstance(score, int | float) or isinstance(score, bool) or not math.isfinite(score):
        raise ValueError(f"{where}.score: expected a finite number, got {brief(score)}")
    return Document(str(name), contents, float(score))
