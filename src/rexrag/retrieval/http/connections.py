"""uvicorn with bounds on what a connection may hold: its time, its unread answer, its place, its log lines.

Left to itself uvicorn lets a connection that sends nothing stay for ever, and where no file descriptor is
left for the next one asyncio logs a traceback for each in its queue, over and over.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10.0
"""From a connection, or from its last answer, to the whole head of a request."""
UNREAD_SECONDS = 30.0
"""An answer that its client does not read is kept for so long."""
UNREAD_BYTES = 256 * 2**20
"""Of all answers that are not read yet."""
MOST_CONNECTIONS = 1024
LAST_SECONDS = 5.0
"""How long a service that was told to stop goes on with the search it has begun."""
LINES, LINE_SECONDS = 20, 60.0
"""Lines that a logger may write in so many seconds."""
FILES = 32
"""File descriptors that are kept free beside those of connections."""
WANTED_FILES = 4096


class Server(uvicorn.Server):  # type: ignore[misc]
    """Serves an application of `create_app` on sockets that listen already."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app
        most, backlog = connection_limits()
        config = uvicorn.Config(
            app,
            http=_protocol(most),
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            backlog=backlog,
            timeout_keep_alive=int(HEAD_SECONDS),
            # Longer than LAST_SECONDS, after which nothing is left to wait for.
            timeout_graceful_shutdown=int(2 * LAST_SECONDS),
        )
        super().__init__(config)
        for name in ("uvicorn.error", "asyncio"):
            logger = logging.getLogger(name)
            if not any(isinstance(old, LogLimit) for old in logger.filters):
                logger.addFilter(LogLimit())

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._watching = asyncio.create_task(self._watch())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.app.state.stop(LAST_SECONDS)
        await super().shutdown(sockets)
        self._watching.cancel()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(min(1.0, HEAD_SECONDS / 4))
            close_overdue(list(self.server_state.connections), time.monotonic())


class Connection(H11Protocol):  # type: ignore[misc]
    """uvicorn's connection, with the time since when it waits for a request."""

    most = MOST_CONNECTIONS

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.since = time.monotonic()
        others = [other for other in self.connections if isinstance(other, Connection)]
        if len(others) >= self.most:
            # The longest idle one makes room; one that is being served never does.
            idle = [other for other in others if other.is_idle]
            if not idle:
                transport.abort()
                return
            longest = min(idle, key=lambda other: other.since)
            self.connections.discard(longest)
            longest.transport.abort()
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.transport is not None:  # None where it was never taken
            super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport is not None:
            super().data_received(data)

    def on_response_complete(self) -> None:
        self.since = time.monotonic()
        super().on_response_complete()

    @property
    def is_idle(self) -> bool:
        """Between requests: the head of the next one is not whole."""
        return self.cycle is None or bool(self.cycle.response_complete)

    @property
    def unread(self) -> int:
        """Bytes of answers that the client has not taken yet."""
        return int(self.transport.get_write_buffer_size())


class LogLimit(logging.Filter):
    """At most LINES records in LINE_SECONDS; the first one after that says how many were left out."""

    def __init__(self) -> None:
        super().__init__()
        self._begun, self._passed, self._dropped = -LINE_SECONDS, 0, 0

    def filter(self, record: logging.LogRecord) -> bool:
        now = time.monotonic()
        if now - self._begun >= LINE_SECONDS:
            if self._dropped:
                record.msg = f"{record.getMessage()} ({self._dropped:,} more lines were left out)"
                record.args = ()
            self._begun, self._passed, self._dropped = now, 0, 0
        self._passed += 1
        if self._passed > LINES:
            self._dropped += 1
            return False
        return True


def close_overdue(connections: list[Any], now: float) -> None:
    """Abort connections that wait too long for a head, or hold an answer that nobody reads."""
    open_ = [connection for connection in connections if isinstance(connection, Connection)]
    for connection in open_:
        waited = now - connection.since
        allowed = UNREAD_SECONDS if connection.unread else HEAD_SECONDS
        if connection.is_idle and waited > allowed:
            connection.transport.abort()
    unread = sum(connection.unread for connection in open_)
    for connection in sorted(open_, key=lambda connection: -connection.unread):
        if unread <= UNREAD_BYTES:
            break
        unread -= connection.unread
        connection.transport.abort()


def connection_limits() -> tuple[int, int]:
    """(connections, backlog) that the limit on open files carries; that limit is raised where it may be.

    asyncio accepts a whole backlog before it starts the first connection of it, so both count.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < WANTED_FILES:
        wanted = WANTED_FILES if hard == resource.RLIM_INFINITY else min(hard, WANTED_FILES)
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    files = WANTED_FILES if soft == resource.RLIM_INFINITY else soft
    backlog = max(8, min(256, files // 8))
    return max(8, min(MOST_CONNECTIONS, files - _open_files() - FILES - backlog)), backlog


def _open_files() -> int:
    try:
        return len(os.listdir(Path("/proc/self/fd")))
    except OSError:
        return 64


def _protocol(most: int) -> type[Connection]:
    return type("Connection", (Connection,), {"most": most})
