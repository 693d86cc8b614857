"""A retriever that means harm, or is broken in odd ways, costs its client a bounded time and memory."""

import gzip
import resource
import socket
import time
from collections.abc import Callable

import pytest

from rexrag.errors import RetrievalError
from rexrag.retrieval.http.client import ANSWER_BYTES, PASSAGE_BYTES, RemoteRetriever
from tests.support.attacks import answer, peer, read_request

MEGABYTE = b" " * 2**20
GOOD = b'{"result": [[{"document": {"id": "1", "contents": "x"}, "score": 1}]]}'


def failure(handle: Callable[[socket.socket], None], timeout: float = 20.0, retries: int = 0) -> str:
    with (
        peer(handle) as url,
        RemoteRetriever(url, timeout=timeout, retries=retries) as client,
        pytest.raises(RetrievalError) as caught,
    ):
        client.search(["q"], 3)
    return str(caught.value).replace(url, "URL")


def endless(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    for _ in range(1024):
        connection.sendall(MEGABYTE)


def test_an_answer_of_a_gigabyte_is_given_up_after_what_was_asked_for() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    said = failure(endless)
    assert f"the answer is longer than {ANSWER_BYTES + 3 * PASSAGE_BYTES:,} bytes" in said
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 64 * 1024, f"{grown} kB more"


def test_a_compressed_answer_is_not_unpacked() -> None:
    bomb = gzip.compress(b" " * 2**26)
    said = failure(answer(bomb, headers=[f"Content-Length: {len(bomb)}", "Content-Encoding: gzip"]))
    assert "compressed (gzip), although none was asked for" in said


def test_compression_is_not_asked_for() -> None:
    seen: list[bytes] = []
    handle = answer(GOOD, headers=[f"Content-Length: {len(GOOD)}"])
    with peer(handle, seen) as url, RemoteRetriever(url, retries=0) as client:
        assert client.search(["q"], 1)[0][0].id == "1"
    assert b"\r\naccept-encoding: identity\r\n" in seen[0].lower()


def drip_head(connection: socket.socket) -> None:
    for _ in range(200):
        connection.sendall(b"H")
        time.sleep(0.05)


def drip_headers(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    for number in range(200):
        connection.sendall(f"X-{number}: y\r\n".encode())
        time.sleep(0.05)


@pytest.mark.parametrize(
    "handle",
    [
        drip_head,
        drip_headers,
        answer(*[b" "] * 200, headers=["Content-Length: 1000"], pause=0.05),
        answer(*[b"1\r\n \r\n"] * 200, headers=["Transfer-Encoding: chunked"], pause=0.05),
        lambda connection: time.sleep(5),
    ],
    ids=["status line", "headers", "body", "chunks", "nothing"],
)
def test_a_byte_now_and_then_does_not_hold_a_search_past_its_time(
    handle: Callable[[socket.socket], None],
) -> None:
    begun = time.monotonic()
    said = failure(handle, timeout=0.5)
    assert time.monotonic() - begun < 3
    assert "ReadTimeout: no whole answer within 0.5 s" in said or "RemoteProtocolError" in said


def test_a_head_without_end_is_refused() -> None:
    def handle(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
        for _ in range(64):
            connection.sendall(MEGABYTE)

    assert "RemoteProtocolError" in failure(handle) or "ReadError" in failure(handle)


@pytest.mark.parametrize("deep", [b"[" * 200_000, b'{"result":' * 50_000])
def test_deep_json_is_one_line(deep: bytes) -> None:
    said = failure(answer(deep, headers=[f"Content-Length: {len(deep)}"]))
    assert "not a /retrieve answer: expected JSON" in said and "\n" not in said and len(said) < 400


def test_control_characters_of_an_answer_reach_no_terminal() -> None:
    evil = b"\x1b]0;owned\x07\x1b[2J" * 4
    said = failure(answer(evil, headers=[f"Content-Length: {len(evil)}"]))
    assert "\x1b" not in said and "\x07" not in said


def test_redirects_in_a_circle_end() -> None:
    def handle(connection: socket.socket) -> None:
        while True:
            connection.sendall(b"HTTP/1.1 307 X\r\nLocation: /again\r\nContent-Length: 0\r\n\r\n")
            read_request(connection)

    assert "4 redirects in a row" in failure(handle)
