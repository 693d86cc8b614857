"""Raw sockets and real processes, for tests that misbehave on purpose. Loopback only."""

import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path


def environment(**more: str) -> dict[str, str]:
    """The surroundings of a child process that runs this checkout."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "NO_PROXY": "*", **more}


def rexrag(*words: object, timeout: float = 120, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the command line and return what it said."""
    command = [sys.executable, "-m", "rexrag", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment(**more))


@contextmanager
def serving(
    index: Path, log: Path, *options: str, files: int = 0, **more: str
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """`rexrag serve` in a process of its own, with at most `files` descriptors: (process, port)."""
    words = [sys.executable, "-m", "rexrag", "serve", str(index), "--port", "0", *options]
    if files:
        words = ["bash", "-c", f'ulimit -n {files}; exec "$@"', "bash", *words]
    with log.open("wb") as errors:
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment(**more)
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r":(\d+)/retrieve", line)
        assert found, log.read_text()
        yield process, int(found[1])
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@contextmanager
def idle_connections(port: int, count: int) -> Iterator[list[socket.socket]]:
    """Connections that say nothing. Fewer where the other side lets no more in."""
    opened: list[socket.socket] = []
    try:
        for _ in range(count):
            with suppress(OSError):
                opened.append(socket.create_connection(("127.0.0.1", port), timeout=5))
        yield opened
    finally:
        for connection in opened:
            connection.close()


def closed_within(connection: socket.socket, seconds: float) -> bool:
    """Whether the other side ends the connection in time; what it says before that is read and dropped."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        connection.settimeout(left)
        try:
            if not connection.recv(65536):
                return True
        except TimeoutError:
            return False
        except OSError:
            return True
    return False


def read_request(connection: socket.socket) -> bytes:
    """Head and body of one request."""
    request = b""
    while b"\r\n\r\n" not in request:
        request += connection.recv(65536)
    head, _, body = request.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: (\d+)", head)
    while length and len(body) < int(length[1]):
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


@contextmanager
def peer(handle: Callable[[socket.socket], None], seen: list[bytes] | None = None) -> Iterator[str]:
    """The address of a server that reads a client's request (into `seen`), then does as `handle` says."""
    stopping = threading.Event()

    def one(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            request = read_request(connection)
            if seen is not None:
                seen.append(request)
            handle(connection)

    def loop() -> None:
        while not stopping.is_set():
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=one, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=loop, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            stopping.set()
            with suppress(OSError):
                listening.shutdown(socket.SHUT_RDWR)
            thread.join(10)


def answer(
    *pieces: bytes, headers: Sequence[str] = (), pause: float = 0.0
) -> Callable[[socket.socket], None]:
    """A handler that sends a status line, headers and pieces of a body, with a pause before each piece."""

    def handle(connection: socket.socket) -> None:
        head = "\r\n".join(["HTTP/1.1 200 OK", "Content-Type: application/json", *headers])
        connection.sendall(f"{head}\r\n\r\n".encode())
        for piece in pieces:
            time.sleep(pause)
            connection.sendall(piece)

    return handle
