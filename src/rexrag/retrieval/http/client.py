"""A retriever elsewhere: the client of Search-R1's `/retrieve` protocol.

A search either answers every query or raises RetrievalError; it never turns a failure into "nothing found".
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

import httpx

from rexrag.errors import ConfigError, RetrievalError
from rexrag.http import (
    TOKEN_VARIABLE,
    BadAnswer,
    Client,
    first_words,
    may_pass,
    parse_address,
    parse_json,
    pause,
    retry_after,
)
from rexrag.io import brief
from rexrag.types import Document

log = logging.getLogger(__name__)

REQUEST_CHARACTERS = 262_144
"""Characters of the queries in one request; a longer query goes alone."""
MOST_BYTES = 64 * 2**20
"""Of one answer, however many passages were asked for."""
ANSWER_BYTES, PASSAGE_BYTES = 2**20, 2**18
"""What an answer may hold: so much, and so much more for each passage that was asked for."""
QUIET_SECONDS = 30.0
"""Between two lines that say that a request failed and is tried again."""


class RemoteRetriever:
    """A `Retriever` over HTTP. Use it as a context manager, or call `close`.

    `url` is the address of the endpoint; `/retrieve` is added where it has no path. Tried again, up to
    `retries` times with growing, jittered pauses: no connection, a time-out, status 429 and 5xx; the first
    failure is logged at once. Any other status and an answer of the wrong shape fail at once. `timeout` is in
    seconds, for one whole try.
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
        transport: Any = None,
    ) -> None:
        """`token` falls back to $REXRAG_RETRIEVER_TOKEN, `transport` is httpx's, for tests.

        Raises ConfigError where `url` or the proxy settings of the environment are unusable.
        """
        self.url = endpoint(url)
        self.retries = retries
        self.batch = batch
        self._sleep = sleep
        # Its own generator: a retry must not shift the random numbers of a run.
        self._jitter = jitter or random.Random()
        self._said = -math.inf
        token = token or os.environ.get(TOKEN_VARIABLE)
        self._http = Client(self.url.host, timeout=timeout, token=token, transport=transport)

    @property
    def digest(self) -> str:
        """Identity of the address; what corpus stands behind it cannot be known from here."""
        return hashlib.sha256(f"remote {self.url}".encode()).hexdigest()

    def search(self, queries: Sequence[str], topk: int) -> list[list[Document]]:
        """At most `topk` documents a query, best first. Raises RetrievalError; ConfigError if topk < 1."""
        if topk < 1:
            raise ConfigError(f"topk is {topk}; expected at least 1")
        found: list[list[Document]] = []
        for part in _requests([_valid(query) for query in queries], self.batch):
            answer = self._post(
                {"queries": part, "topk": topk, "return_scores": True},
                min(MOST_BYTES, ANSWER_BYTES + PASSAGE_BYTES * topk * len(part)),
            )
            try:
                found += parse_answer(answer, len(part), topk)
            except (ValueError, OverflowError) as error:
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

    def _post(self, body: dict[str, Any], most_bytes: int) -> httpx.Response:
        for attempt in range(self.retries + 1):
            asked = None
            try:
                response = self._http.request("POST", self.url, body=body, most_bytes=most_bytes)
            except httpx.TransportError as error:
                cause = f"{type(error).__name__}: {error}"
            except (httpx.HTTPError, BadAnswer) as error:
                raise RetrievalError(f"{self.url}: {error}") from None
            else:
                if response.is_success:
                    return response
                cause = f"status {response.status_code}: {first_words(response)}"
                if not may_pass(response):
                    raise RetrievalError(f"{self.url}: {cause}", refused=True)
                asked = retry_after(response.headers.get("Retry-After"))
            if attempt < self.retries:
                self._say(cause)
                self._sleep(pause(attempt, asked, self._jitter))
        raise RetrievalError(f"{self.url}: failed {self.retries + 1} times, the last time with {cause}")

    def _say(self, cause: str) -> None:
        """Log a failure that is followed by another try; of many in a row, one line now and then."""
        now = time.monotonic()
        if now - self._said > QUIET_SECONDS:
            self._said = now
            log.warning("%s: %s; trying again, %d times at most", self.url, cause, self.retries)


def endpoint(url: str) -> httpx.URL:
    """The address that is posted to. Raises ConfigError."""
    parsed = parse_address(url, "retriever url", TOKEN_VARIABLE, "http://127.0.0.1:8000/retrieve")
    return parsed.copy_with(path="/retrieve") if parsed.path in ("", "/") else parsed


def parse_answer(response: httpx.Response, queries: int, topk: int) -> list[list[Document]]:
    """Documents from `{"result": [[{"document": {…}, "score": …}, …], …]}`. Raises ValueError.

    `id` and `score` may be missing: Search-R1's web search services send neither. A missing id is made
    from the contents.
    """
    body = parse_json(response)
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


def _requests(queries: list[str], most: int) -> Iterator[list[str]]:
    """The queries in order, as many in a request as may go together."""
    part: list[str] = []
    characters = 0
    for query in queries:
        if part and (len(part) == most or characters + len(query) > REQUEST_CHARACTERS):
            yield part
            part, characters = [], 0
        part.append(query)
        characters += len(query)
    if part:
        yield part


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
