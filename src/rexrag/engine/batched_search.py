"""Searches of many episodes at once become few requests.

No timer: whatever queries have come while every connection was busy go out together on the next free one.
Back-off and retries are the client's own (`retrieval/http/client.py`).
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

from rexrag.retrieval.base import Retriever
from rexrag.types import Document


@dataclass(slots=True)
class _Asked:
    query: str
    topk: int
    answer: asyncio.Future[list[Document]]


@dataclass(slots=True)
class BatchedSearch:
    """An asynchronous `search` over a blocking retriever. Bound to the event loop that first uses it.

    batch: queries in one request, at most; connections: requests in flight at once.
    """

    retriever: Retriever
    batch: int = 64
    connections: int = 4
    _waiting: deque[_Asked] = field(default_factory=deque)
    _busy: set[asyncio.Task[None]] = field(default_factory=set)

    async def search(self, query: str, topk: int) -> list[Document]:
        """Documents for one query, best first. Raises what the retriever raises."""
        asked = _Asked(query, topk, asyncio.get_running_loop().create_future())
        self._waiting.append(asked)
        if len(self._busy) < self.connections:
            task = asyncio.create_task(self._work())
            self._busy.add(task)
            task.add_done_callback(self._busy.discard)
        return await asked.answer

    async def _work(self) -> None:
        """Ask until nobody waits."""
        while self._waiting:
            await asyncio.sleep(0)  # episodes that are ready now come along
            topk = self._waiting[0].topk if self._waiting else 0
            part: list[_Asked] = []
            while self._waiting and len(part) < self.batch and self._waiting[0].topk == topk:
                part.append(self._waiting.popleft())
            if part:
                await self._ask(part, topk)

    async def _ask(self, part: list[_Asked], topk: int) -> None:
        try:
            queries = [asked.query for asked in part]
            answers = await asyncio.to_thread(self.retriever.search, queries, topk)
        except Exception as error:  # the episode that waits decides what it means
            for asked in part:
                if not asked.answer.done():
                    asked.answer.set_exception(error)
            return
        for asked, documents in zip(part, answers, strict=True):
            if not asked.answer.done():
                asked.answer.set_result(documents)
