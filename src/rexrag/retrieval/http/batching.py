"""Queries of many requests searched together, with a cache in front and a bound on what may wait.

While one batch is searched the next one collects, so a lone request waits for nobody and a crowd shares
searches. Only queries with the same topk go together: an approximate index can answer another differently.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from cachetools import LRUCache

from rexrag.retrieval.base import Retriever
from rexrag.retrieval.http.metrics import Metrics
from rexrag.types import Document

Key = tuple[str, int]
Job = tuple[Key, "asyncio.Future[list[Document]]"]


class Overloaded(Exception):
    """Too many queries wait; `seconds` until there should be room."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"too many queries are waiting; try again in {seconds} s")
        self.seconds = seconds


class Batcher:
    """Searches for one event loop; every method is called on it."""

    def __init__(
        self, retriever: Retriever, metrics: Metrics, *, batch: int, waiting: int, cache: int
    ) -> None:
        self.retriever, self.metrics = retriever, metrics
        self.batch, self.waiting = batch, waiting
        self.cache: LRUCache[Key, list[Document]] | None = (
            LRUCache(cache, getsizeof=lambda found: len(found) + 1) if cache else None
        )
        self.queue: deque[Job] = deque()
        self.pending: dict[Key, asyncio.Future[list[Document]]] = {}
        self.worker: asyncio.Task[None] | None = None
        # One thread: a ranker that can use more cores does so itself, over the whole batch.
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="search")
        self.seconds_a_query = 0.0

    async def search(self, queries: Sequence[str], topk: int) -> list[list[Document]]:
        """Raises Overloaded before anything is queued, or what the search raised."""
        keys = [(query, topk) for query in queries]
        known = {key: found for key in keys if (found := self._cached(key)) is not None}
        self.metrics.cache_hits.inc(sum(key in known for key in keys))
        # The same query twice, in one request or in several, is searched once.
        new = list(dict.fromkeys(key for key in keys if key not in known and key not in self.pending))
        if new and self.queue and len(self.queue) + len(new) > self.waiting:
            raise Overloaded(self._wait())
        for key in new:
            self.pending[key] = asyncio.get_running_loop().create_future()
            self.queue.append((key, self.pending[key]))
        self.metrics.waiting.set(len(self.queue))
        waited = {key: self.pending[key] for key in keys if key not in known}
        if self.queue and (self.worker is None or self.worker.done()):
            self.worker = asyncio.create_task(self._work())
        # Shielded: a client that goes away must not take the answer from others who wait for it.
        await asyncio.shield(asyncio.gather(*waited.values()))
        return [known[key] if key in known else waited[key].result() for key in keys]

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self.queue:
            jobs = self._next()
            self.metrics.waiting.set(len(self.queue))
            topk = jobs[0][0][1]
            begun = time.perf_counter()
            try:
                found = await loop.run_in_executor(
                    self.thread, self.retriever.search, [query for (query, _), _ in jobs], topk
                )
            except Exception as error:
                for key, future in jobs:
                    self.pending.pop(key).set_exception(error)
                    future.exception()  # seen, also where the client has gone
                continue
            seconds = time.perf_counter() - begun
            self.metrics.searched(len(jobs), seconds)
            share = seconds / len(jobs)
            self.seconds_a_query = 0.8 * self.seconds_a_query + 0.2 * share if self.seconds_a_query else share
            for (key, future), documents in zip(jobs, found, strict=True):
                if self.cache is not None and len(documents) < self.cache.maxsize:
                    self.cache[key] = documents
                self.pending.pop(key)
                future.set_result(documents)

    def _next(self) -> list[Job]:
        """The oldest jobs that have the same topk as the oldest of all."""
        topk = self.queue[0][0][1]
        jobs = [self.queue.popleft()]
        while self.queue and len(jobs) < self.batch and self.queue[0][0][1] == topk:
            jobs.append(self.queue.popleft())
        return jobs

    def _cached(self, key: Key) -> list[Document] | None:
        return self.cache.get(key) if self.cache is not None else None

    def _wait(self) -> int:
        return max(1, min(30, math.ceil(len(self.queue) * self.seconds_a_query)))
