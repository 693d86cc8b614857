"""Queries of many callers searched together, with a cache in front and bounds on what may wait.

While one batch is searched the next one collects, so a lone caller waits for nobody and a crowd shares
searches. Callers take turns: one with a thousand queries delays one with a single query by one batch at most.
Only queries with the same topk go together: an approximate index can answer another differently.
"""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import cast

from cachetools import LRUCache

from rexrag.errors import RetrievalError
from rexrag.retrieval.base import Retriever
from rexrag.types import Document

Key = tuple[str, int]
"""A query and its topk."""
OBJECT_BYTES = 200
"""What Python keeps for one document or query beside its texts."""


class Overloaded(Exception):
    """Too many queries wait; `seconds` until there should be room."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"too many queries are waiting; try again in {seconds} s")
        self.seconds = seconds


class Stopped(Exception):
    """The search was stopped before this query was answered."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much is searched together, and how much may wait. 0 is no bound, for the cache no cache."""

    batch: int = 256
    """Queries of one search."""
    batch_characters: int = 65_536
    """Of the queries of one search; a longer query goes alone."""
    searches: int = 1
    """Searches side by side. A ranker that can use more cores does so itself, over the whole batch."""
    waiting: int = 0
    """Queries that may wait. A caller with more of them is served where nothing else waits."""
    waiting_characters: int = 0
    cache_bytes: int = 0
    """Memory of the answers that are kept, least recently used out first."""


class Observer:
    """Hears what is searched; these methods do nothing."""

    def cached(self, queries: int) -> None:
        """So many queries were answered from the cache."""

    def waits(self, queries: int) -> None:
        """So many queries wait now."""

    def searched(self, queries: int, seconds: float) -> None:
        """A search of so many queries took so long."""


@dataclass(slots=True, eq=False)
class _Job:
    """One query that is to be searched, for everybody who asks for it."""

    key: Key
    answer: asyncio.Future[list[Document]]
    callers: int = 0
    waits: bool = True
    """In a line still: neither taken into a search nor given up."""


@dataclass(slots=True)
class _Line:
    """What one caller waits for, in order."""

    topk: int
    jobs: deque[_Job] = field(default_factory=deque)


class BatchedSearch:
    """Searches for one event loop, on which every method is called; see also `search_from_thread`."""

    def __init__(
        self, retriever: Retriever, bounds: Bounds | None = None, observer: Observer | None = None
    ) -> None:
        self.retriever = retriever
        self.bounds = bounds or Bounds()
        self.observer = observer or Observer()
        self._cache: LRUCache[Key, tuple[list[Document], int]] | None = None
        if self.bounds.cache_bytes:
            self._cache = LRUCache(self.bounds.cache_bytes, getsizeof=lambda answer: answer[1])
        self._jobs: dict[Key, _Job] = {}
        self._lines: deque[_Line] = deque()
        self._waiting = self._characters = 0
        self._workers: set[asyncio.Task[None]] = set()
        self._threads = ThreadPoolExecutor(self.bounds.searches, thread_name_prefix="search")
        self._seconds_a_query = 0.0
        self._stopped = False

    async def search(self, queries: Sequence[str], topk: int) -> list[list[Document]]:
        """The documents of each query, best first. A caller that is cancelled gives its queries up.

        Raises Overloaded before anything waits, Stopped, or what the retriever raised.
        """
        if self._stopped:
            raise Stopped
        keys = [(query, topk) for query in queries]
        known = {key: found for key in keys if (found := self._cached(key)) is not None}
        self.observer.cached(sum(key in known for key in keys))
        # The same query twice, of one caller or of several, is searched once.
        asked = [key for key in dict.fromkeys(keys) if key not in known]
        self._add([key for key in asked if key not in self._jobs], topk)
        jobs = {key: self._jobs[key] for key in asked}
        for job in jobs.values():
            job.callers += 1
        try:
            if jobs:
                answers = [job.answer for job in jobs.values()]
                await asyncio.wait(answers, return_when=asyncio.FIRST_EXCEPTION)
                for answer in answers:
                    if answer.done():
                        answer.result()  # raises where one failed; then others may be unfinished
            return [known[key] if key in known else jobs[key].answer.result() for key in keys]
        finally:
            for job in jobs.values():
                job.callers -= 1
                if not job.callers and job.waits:
                    self._give_up(job)

    async def one(self, query: str, topk: int) -> list[Document]:
        """The documents of one query: `search` as an episode calls it."""
        [found] = await self.search([query], topk)
        return found

    def stop(self, seconds: float) -> None:
        """Take no more queries; those that wait fail with Stopped, those being searched after `seconds`."""
        self._stopped = True
        for job in [job for job in self._jobs.values() if job.waits]:
            self._give_up(job, Stopped())
        asyncio.get_running_loop().call_later(seconds, self._stop_all)

    def _stop_all(self) -> None:
        for job in list(self._jobs.values()):
            self._finish(job, error=Stopped())

    def _add(self, new: Sequence[Key], topk: int) -> None:
        """Line up the queries that nobody has asked for yet. Raises Overloaded."""
        if not new:
            return
        characters = sum(len(query) for query, _ in new)
        many = self.bounds.waiting and self._waiting + len(new) > self.bounds.waiting
        most = self.bounds.waiting_characters
        if self._waiting and (many or (most and self._characters + characters > most)):
            raise Overloaded(max(1, min(30, math.ceil(self._waiting * self._seconds_a_query))))
        line = _Line(topk)
        loop = asyncio.get_running_loop()
        for key in new:
            self._jobs[key] = job = _Job(key, loop.create_future())
            line.jobs.append(job)
        self._lines.append(line)
        self._count(len(new), characters)
        if len(self._workers) < self.bounds.searches:
            self._workers.add(asyncio.create_task(self._work()))

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(0)  # callers that are ready now come along
            jobs = self._next()
            if not jobs:
                # Here, not in a callback of the task: a caller that comes before that would wait for ever.
                self._workers.discard(cast("asyncio.Task[None]", asyncio.current_task()))
                return
            begun = time.perf_counter()
            try:
                queries = [job.key[0] for job in jobs]
                found = await loop.run_in_executor(self._threads, self._ask, queries, jobs[0].key[1])
            except Exception as error:
                for job in jobs:
                    self._finish(job, error=error)
                continue
            seconds = time.perf_counter() - begun
            self.observer.searched(len(jobs), seconds)
            share = seconds / len(jobs)
            before = self._seconds_a_query
            self._seconds_a_query = 0.8 * before + 0.2 * share if before else share
            for job, documents in zip(jobs, found, strict=True):
                size = _answer_bytes(job.key[0], documents)
                if self._cache is not None and size <= self._cache.maxsize:
                    self._cache[job.key] = documents, size
                self._finish(job, documents)

    def _ask(self, queries: list[str], topk: int) -> list[list[Document]]:
        """The search itself, in a thread."""
        found = self.retriever.search(queries, topk)
        if len(found) != len(queries):
            raise RetrievalError(f"{len(queries)} queries, but the retriever gave {len(found)} answers")
        return found

    def _next(self) -> list[_Job]:
        """The jobs of one search: from each line in turn, of one topk, as much as goes together."""
        taken: list[_Job] = []
        characters = topk = 0
        others: list[_Line] = []
        while self._lines and len(taken) < (self.bounds.batch or sys.maxsize):
            line = self._lines.popleft()
            while line.jobs and not line.jobs[0].waits:
                line.jobs.popleft()
            if not line.jobs:
                continue
            if taken and line.topk != topk:
                others.append(line)
                continue
            length = len(line.jobs[0].key[0])
            if taken and self.bounds.batch_characters and characters + length > self.bounds.batch_characters:
                self._lines.appendleft(line)
                break
            job = line.jobs.popleft()
            job.waits = False
            self._count(-1, -length)
            topk, characters = line.topk, characters + length
            taken.append(job)
            self._lines.append(line)
        self._lines.extendleft(reversed(others))  # they have waited longer
        return taken

    def _give_up(self, job: _Job, error: Exception | None = None) -> None:
        """A job that waits is not searched; its line drops it."""
        job.waits = False
        self._count(-1, -len(job.key[0]))
        self._finish(job, error=error or Stopped())

    def _finish(
        self, job: _Job, documents: list[Document] | None = None, error: Exception | None = None
    ) -> None:
        if self._jobs.get(job.key) is job:
            del self._jobs[job.key]
        if job.answer.done():
            return
        if error is not None:
            job.answer.set_exception(error)
            job.answer.exception()  # seen, also where nobody waits for it any more
        else:
            job.answer.set_result(documents or [])

    def _count(self, queries: int, characters: int) -> None:
        self._waiting += queries
        self._characters += characters
        self.observer.waits(self._waiting)

    def _cached(self, key: Key) -> list[Document] | None:
        found = self._cache.get(key) if self._cache is not None else None
        return found[0] if found is not None else None


def search_from_thread(search: BatchedSearch, queries: Sequence[str], topk: int) -> list[list[Document]]:
    """`search.search` for callers in threads of their own: those that ask at once share searches.

    All of them use this function, which runs the search on this process's background event loop.
    """
    from rexrag.http import background_loop

    return asyncio.run_coroutine_threadsafe(search.search(queries, topk), background_loop()).result()


def _answer_bytes(query: str, documents: Sequence[Document]) -> int:
    """About the memory of an answer with its query."""
    texts = sum(sys.getsizeof(document.contents) + sys.getsizeof(document.id) for document in documents)
    return sys.getsizeof(query) + texts + OBJECT_BYTES * (len(documents) + 2)
