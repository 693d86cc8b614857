"""Clients that hold connections, ask for much, lie about names or leave: the others are served."""

import json
import logging
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from rexrag.retrieval.batching import BatchedSearch, Bounds, Stopped, search_from_thread
from rexrag.retrieval.http import connections, guard
from rexrag.retrieval.http.connections import LogLimit, Server, connection_limits
from rexrag.retrieval.http.service import Limits, create_app, listen
from rexrag.retrieval.index.folder import save_index
from rexrag.retrieval.rankers.bm25 import BM25Retriever
from rexrag.types import Document
from tests.support.attacks import closed_within, idle_connections, serving
from tests.support.live_service import running

PASSAGES = [
    Document(str(i), f'"P{i}"\nThe passage number{i} of a small corpus about kilns.') for i in range(50)
]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_index(BM25Retriever.build(PASSAGES), tmp_path_factory.mktemp("served") / "index")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch):
    """Runs an application on the real server with its deadlines shortened; gives its port."""
    monkeypatch.setattr(connections, "HEAD_SECONDS", 1.0)
    monkeypatch.setattr(connections, "UNREAD_SECONDS", 2.0)
    monkeypatch.setattr(connections, "LAST_SECONDS", 1.0)
    monkeypatch.setattr(guard, "BODY_SECONDS", 1.0)
    ends: list[Callable[[], None]] = []

    def start(retriever: object, **options: object) -> int:
        listening = listen("127.0.0.1", 0)
        server = Server(create_app(retriever, **options))  # type: ignore[arg-type]
        server.config.timeout_keep_alive = 1
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.01)

        def end() -> None:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()

        ends.append(end)
        return int(listening.getsockname()[1])

    yield start
    for end in ends:
        end()


def head(port: int, length: int, *more: str) -> bytes:
    lines = [
        "POST /retrieve HTTP/1.1",
        f"Host: 127.0.0.1:{port}",
        "Content-Type: application/json",
        f"Content-Length: {length}",
        *more,
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def healthy(port: int, timeout: float = 5.0) -> bool:
    with suppress(httpx.HTTPError):
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=timeout, trust_env=False).is_success
    return False


@pytest.mark.parametrize(("files", "count"), [(256, 400), (1024, 1600)])
def test_idle_connections_beyond_the_file_limit_do_not_hold_health(
    files: int, count: int, index: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with serving(index, log, files=files) as (_, port), idle_connections(port, count):
        for _ in range(10):
            assert healthy(port)
            time.sleep(0.1)
        assert log.stat().st_size < 20_000, "log lines are bounded"


@pytest.mark.parametrize(
    "said",
    [b"", b"GET /hea", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ", b"\x16\x03\x01"],
    ids=["nothing", "half a line", "half a head", "tls"],
)
def test_a_head_that_does_not_come_ends_the_connection(served, said: bytes) -> None:
    port = served(BM25Retriever.build(PASSAGES))
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(said)
        assert closed_within(connection, 5)


def test_a_head_that_drips_ends_the_connection(served) -> None:
    port = served(BM25Retriever.build(PASSAGES))
    with socket.create_connection(("127.0.0.1", port)) as connection, pytest.raises(OSError):
        for _ in range(60):
            connection.sendall(b"G")
            time.sleep(0.1)


def test_a_body_that_drips_is_answered_408_and_ended(served) -> None:
    port = served(BM25Retriever.build(PASSAGES))
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head(port, 1000) + b'{"queries"')
        connection.settimeout(5)
        assert b" 408 " in connection.recv(65536)
        assert closed_within(connection, 5)


def test_an_answer_that_nobody_reads_is_dropped(served) -> None:
    class Long:
        digest = "long"

        def search(self, queries: Sequence[str], topk: int) -> list[list[Document]]:
            return [[Document("1", "x" * 2**20)] * topk for _ in queries]

    port = served(Long())
    with socket.create_connection(("127.0.0.1", port)) as connection:
        body = json.dumps({"queries": ["q"], "topk": 40}).encode()
        connection.sendall(head(port, len(body)) + body)
        time.sleep(5)  # nothing is read
        received = 0
        with suppress(OSError):
            connection.settimeout(5)
            while data := connection.recv(2**20):
                received += len(data)
        assert received < 40 * 2**20
    assert healthy(port)


def test_a_stranger_is_refused_before_its_body_is_read(served) -> None:
    port = served(BM25Retriever.build(PASSAGES), token="correct horse battery staple")
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head(port, 8_000_000))  # and not a byte of it
        connection.settimeout(5)
        begun = time.monotonic()
        assert b" 401 " in connection.recv(65536)
        assert time.monotonic() - begun < 0.9, "no wait for the body's deadline"


@pytest.mark.parametrize(
    ("host", "taken"),
    [
        ("127.0.0.1", True),
        ("localhost:80", True),
        ("LOCALHOST", True),
        ("[::1]:8000", True),
        ("127.9.9.9:1", True),
        ("evil.example", False),
        ("evil.example:8000", False),
        ("127.0.0.1.evil.example", False),
        ("localhost.evil.example:80", False),
        ("[::1].evil.example", False),
        ("0.0.0.0:8000", False),
    ],
)
def test_on_loopback_only_names_of_this_machine_are_answered(host: str, taken: bool) -> None:
    with running(create_app(BM25Retriever.build(PASSAGES))) as url:
        for path in ("/health", "/metrics", "/retrieve"):
            answer = httpx.get(f"{url}{path}", headers={"Host": host}, trust_env=False)
            assert (answer.status_code == 421) is not taken


def test_no_redirect_is_made_of_the_host_header() -> None:
    app = create_app(BM25Retriever.build(PASSAGES), token="correct horse battery staple", host="0.0.0.0")
    with running(app) as url:
        for path in ("/retrieve/", "/health/", "/metrics/", "//evil.example/retrieve"):
            answer = httpx.post(f"{url}{path}", headers={"Host": "evil.example"}, json={}, trust_env=False)
            assert not answer.is_redirect and "location" not in answer.headers


class Slow:
    """Answers after a moment that grows with the queries; remembers what it was asked."""

    digest = "slow"

    def __init__(self, seconds: float = 0.05) -> None:
        self.seconds = seconds
        self.calls: list[list[str]] = []

    def search(self, queries: Sequence[str], topk: int) -> list[list[Document]]:
        self.calls.append(list(queries))
        time.sleep(self.seconds)
        return [[Document(query[:20], query)] for query in queries]


def test_a_large_request_lets_a_small_one_in_after_one_search(served) -> None:
    slow = Slow(0.1)
    port = served(slow, limits=Limits(batch=16))
    url = f"http://127.0.0.1:{port}/retrieve"
    large = threading.Thread(
        target=lambda: httpx.post(
            url, json={"queries": [f"large{i}" for i in range(512)]}, timeout=30, trust_env=False
        )
    )
    large.start()
    while not slow.calls:
        time.sleep(0.01)
    begun = time.monotonic()
    assert httpx.post(url, json={"queries": ["small"]}, timeout=30, trust_env=False).is_success
    assert time.monotonic() - begun < 1.0, "the large one takes more than three seconds"
    large.join()


def test_a_client_that_left_is_not_searched_for(served) -> None:
    slow = Slow(0.2)
    port = served(slow, limits=Limits(batch=8))
    body = json.dumps({"queries": [f"gone{i}" for i in range(400)]}).encode()
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head(port, len(body)) + body)
        while not slow.calls:
            time.sleep(0.01)
    time.sleep(1.0)
    assert len(slow.calls) <= 4, "fifty searches would have been made"
    assert healthy(port)


@pytest.mark.parametrize(
    ("queries", "topk", "said"),
    [
        (["x" * 32_000] * 40, 1, "1280000 characters, at most 1048576"),
        (["x"] * 1024, 100, "1024 with topk 100 are 102400 passages, at most 25600"),
        (["x" * 40_000], 1, "40000 characters, at most 32768"),
    ],
)
def test_what_one_request_may_cost_is_bounded(queries: list[str], topk: int, said: str) -> None:
    with running(create_app(Slow())) as url:
        answer = httpx.post(f"{url}/retrieve", json={"queries": queries, "topk": topk}, trust_env=False)
    assert answer.status_code == 422 and said in answer.json()["detail"]


def test_the_answer_cache_is_bounded_in_bytes() -> None:
    class Long(Slow):
        def search(self, queries: Sequence[str], topk: int) -> list[list[Document]]:
            return [[Document(query, f"{query} " + "y" * 100_000)] * topk for query in queries]

    app_limits = Limits(cache_bytes=2**20)
    with running(create_app(Long(), limits=app_limits)) as url, httpx.Client(trust_env=False) as http:
        for i in range(50):
            assert http.post(f"{url}/retrieve", json={"queries": [f"q{i}"], "topk": 1}).is_success
        assert "rexrag_cache_hits_total 0.0" in http.get(f"{url}/metrics").text
        http.post(f"{url}/retrieve", json={"queries": ["q49"], "topk": 1})
        http.post(f"{url}/retrieve", json={"queries": ["q0"], "topk": 1})  # forgotten long ago
        assert "rexrag_cache_hits_total 1.0" in http.get(f"{url}/metrics").text


def test_batches_are_bounded_in_characters() -> None:
    slow = Slow(0)
    search = BatchedSearch(slow, Bounds(batch_characters=100))
    found = search_from_thread(search, ["a" * 60, "b" * 60, "c" * 30, "d" * 500], 1)
    assert [documents[0].id[0] for documents in found] == ["a", "b", "c", "d"]
    assert [[query[0] for query in call] for call in slow.calls] == [["a"], ["b", "c"], ["d"]]


def test_one_search_after_the_other_never_waits_for_nobody() -> None:
    """Each begins as the one before it ends, when its worker is about to end too."""
    import asyncio

    async def main() -> int:
        search = BatchedSearch(Slow(0))
        for number in range(200):
            await asyncio.wait_for(search.one(f"q{number}", 1), 20)
            await asyncio.gather(*(asyncio.sleep(0) for _ in range(number % 4)))
        return len(search._workers)

    assert asyncio.run(main()) <= 1


def test_threads_share_searches() -> None:
    slow = Slow(0.1)
    search = BatchedSearch(slow)
    found: dict[int, list[list[Document]]] = {}

    def ask(number: int) -> None:
        found[number] = search_from_thread(search, [f"q{number}"], 1)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert {number: rows[0][0].id for number, rows in found.items()} == {i: f"q{i}" for i in range(20)}
    assert len(slow.calls) <= 4


def test_a_retriever_that_answers_too_few_is_an_error_and_no_hang() -> None:
    class Short(Slow):
        def search(self, queries: Sequence[str], topk: int) -> list[list[Document]]:
            return []

    with running(create_app(Short())) as url:
        answer = httpx.post(f"{url}/retrieve", json={"queries": ["a", "b"]}, trust_env=False, timeout=10)
    assert answer.status_code == 502 and "2 queries, but the retriever gave 0 answers" in answer.text


def test_a_search_that_breaks_is_an_error_of_one_line(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Slow):
        def search(self, queries: Sequence[str], topk: int) -> list[list[Document]]:
            raise KeyError("index")

    with running(create_app(Broken())) as url:
        answer = httpx.post(f"{url}/retrieve", json={"queries": ["a"]}, trust_env=False, timeout=10)
    assert (answer.status_code, answer.json()) == (500, {"detail": "the search failed: KeyError"})
    assert "Traceback" not in caplog.text


HANGING = Path(__file__).parent / "hanging_service.py"


def test_sigterm_ends_a_busy_service_in_seconds_without_a_traceback(index: Path, tmp_path: Path) -> None:
    """While a search hangs, others wait, a body drips and a connection is idle."""
    import subprocess
    import sys

    from tests.support.attacks import environment

    log = (tmp_path / "log").open("wb")
    process = subprocess.Popen(
        [sys.executable, str(HANGING), str(index)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )
    assert process.stdout is not None
    try:
        port = int(process.stdout.readline().strip().rpartition(":")[2])
        body = json.dumps({"queries": ["kilns"]}).encode()
        opened = [socket.create_connection(("127.0.0.1", port)) for _ in range(6)]
        opened[0].sendall(head(port, len(body)) + body)
        assert process.stdout.readline() == "searching\n"
        for number, connection in enumerate(opened[1:4]):
            other = json.dumps({"queries": [f"waits {number}"]}).encode()
            connection.sendall(head(port, len(other)) + other)
        opened[4].sendall(head(port, 100) + b"{")
        time.sleep(0.3)
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        opened[1].settimeout(5)
        assert b" 503 " in opened[1].recv(65536)
        assert process.wait(20) in (0, -signal.SIGTERM)
        assert time.monotonic() - begun < 10
        assert "Traceback" not in (tmp_path / "log").read_text()
        for connection in opened:
            connection.close()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        log.close()


def test_queries_that_wait_fail_when_the_search_is_stopped() -> None:
    import asyncio

    slow = Slow(0.3)

    async def main() -> list[object]:
        search = BatchedSearch(slow, Bounds(batch=1))
        asked = [asyncio.create_task(search.search([name], 1)) for name in "abc"]
        await asyncio.sleep(0.1)
        search.stop(5.0)
        return await asyncio.gather(*asked, return_exceptions=True)

    first, *others = asyncio.run(main())
    assert isinstance(first, list) and all(isinstance(error, Stopped) for error in others)
    assert slow.calls == [["a"]]


def test_a_flood_of_log_lines_is_cut_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(connections.time, "monotonic", lambda: now[0])
    limit = LogLimit()

    def passes(count: int) -> int:
        record = [logging.LogRecord("x", 30, "f", 1, "line %d", (i,), None) for i in range(count)]
        return sum(map(bool, map(limit.filter, record)))

    assert passes(1000) == connections.LINES
    now[0] += connections.LINE_SECONDS
    last = logging.LogRecord("x", 30, "f", 1, "again", (), None)
    assert limit.filter(last) and last.getMessage() == "again (980 more lines were left out)"


def test_the_connection_limit_fits_the_file_limit() -> None:
    most, backlog = connection_limits()
    assert 8 <= most <= connections.MOST_CONNECTIONS and 8 <= backlog <= 256


@pytest.mark.parametrize("cases", [200, pytest.param(5_000, marks=pytest.mark.slow)])
def test_random_requests_get_an_answer_or_an_end(cases: int) -> None:
    """Mutated requests over raw sockets: no status from 500 up, and /health answers after all of them."""
    rng = random.Random(7)
    body = json.dumps({"queries": ["kilns", "首都"], "topk": 2, "return_scores": True}).encode()
    seen: set[bytes] = set()
    with running(create_app(BM25Retriever.build(PASSAGES))) as url:
        port = int(url.rpartition(":")[2])
        for _ in range(cases):
            request = bytearray(head(port, len(body)) + body)
            for _ in range(rng.choice([0, 1, 1, 2, 8])):
                place = rng.randrange(len(request))
                request[place : place + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(bytes(request))
                connection.settimeout(0.2)  # some wait for more of a body that does not come
                with suppress(ConnectionResetError, TimeoutError):
                    answer = connection.recv(65536)
                    if answer:
                        seen.add(answer.split(b" ", 2)[1])
        assert healthy(port)
    assert b"200" in seen and not {status for status in seen if status >= b"500"}, seen
