"""A remote search answers every query or raises; it tries again where that can help and nowhere else."""

import json
import random
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rexrag.errors import ConfigError, RetrievalError
from rexrag.http import FIRST_PAUSE, LONGEST_PAUSE, TOKEN_VARIABLE, pause, retry_after
from rexrag.retrieval.http.client import RemoteRetriever, endpoint, parse_answer
from rexrag.retrieval.http.service import create_app
from rexrag.retrieval.rankers.bm25 import BM25Retriever
from rexrag.types import Document
from tests.support.live_service import running

URL = "http://search.test/retrieve"
FIELDS = ["result", "document", "id", "contents", "score"]
GOOD = {"result": [[{"document": {"id": "1", "contents": '"T"\nx'}, "score": 2}]]}


class Server:
    """Answers by a script: a status, an answer body, or an exception a connection would raise."""

    def __init__(self, *script: object) -> None:
        self.script = list(script)
        self.bodies: list[dict[str, object]] = []
        self.headers: list[httpx.Headers] = []
        self.pauses: list[float] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.bodies.append(json.loads(request.content))
        self.headers.append(request.headers)
        step = self.script.pop(0)
        if isinstance(step, Exception):
            raise step
        if isinstance(step, httpx.Response):
            return step
        return httpx.Response(step) if isinstance(step, int) else httpx.Response(200, json=step)

    @contextmanager
    def client(self, **options) -> Iterator[RemoteRetriever]:
        options = {"sleep": self.pauses.append, "jitter": random.Random(0)} | options
        with RemoteRetriever(URL, transport=httpx.MockTransport(self), **options) as client:
            yield client


def test_end_to_end_equals_the_local_search(retriever: BM25Retriever) -> None:
    queries = ["capital of England", "zyxwv", "Mapy Cortés", "the"] * 5
    with running(create_app(retriever)) as url, RemoteRetriever(url, batch=3, retries=0) as remote:
        assert remote.search(queries, 2) == retriever.search(queries, 2)
        assert remote.search([], 2) == []


def test_end_to_end_with_a_token(retriever: BM25Retriever, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(create_app(retriever, token="s3cret")) as url:
        with RemoteRetriever(url) as stranger, pytest.raises(RetrievalError, match="status 401"):
            stranger.search(["Thames"], 1)
        monkeypatch.setenv(TOKEN_VARIABLE, "s3cret")
        with RemoteRetriever(url) as friend:
            assert friend.search(["Thames"], 1)[0][0].id == "d2"


def test_the_request_is_search_r1s() -> None:
    server = Server(GOOD)
    with server.client() as client:
        assert client.search(["who?"], 3) == [[Document("1", '"T"\nx', 2.0)]]
    assert server.bodies == [{"queries": ["who?"], "topk": 3, "return_scores": True}]
    assert "Authorization" not in server.headers[0]


def test_large_batches_are_split_in_order() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        queries = json.loads(request.content)["queries"]
        sizes.append(len(queries))
        rows = [[{"document": {"id": query, "contents": query}, "score": 1}] for query in queries]
        return httpx.Response(200, json={"result": rows})

    sizes: list[int] = []
    queries = [f"q{i}" for i in range(10)]
    with RemoteRetriever(URL, batch=4, transport=httpx.MockTransport(answer)) as client:
        assert [found[0].id for found in client.search(queries, 1)] == queries
    assert sizes == [4, 4, 2]


@pytest.mark.parametrize(
    "failure",
    [
        500,
        503,
        429,
        httpx.ConnectError("refused"),
        httpx.ReadTimeout("slow"),
        httpx.RemoteProtocolError("cut"),
    ],
)
def test_a_server_that_fails_twice_then_works(failure: object) -> None:
    server = Server(failure, failure, GOOD)
    with server.client(retries=2) as client:
        assert client.search(["q"], 1)[0][0].id == "1"
    assert len(server.pauses) == 2
    assert FIRST_PAUSE / 2 <= server.pauses[0] <= FIRST_PAUSE <= server.pauses[1] <= FIRST_PAUSE * 2


@pytest.mark.parametrize("failure", [500, httpx.ConnectError("refused")])
def test_a_server_that_stays_down(failure: object) -> None:
    server = Server(*[failure] * 4)
    cause = "status 500" if failure == 500 else "ConnectError: refused"
    with server.client(retries=3) as client, pytest.raises(RetrievalError) as caught:
        client.search(["q"], 1)
    assert str(caught.value).startswith(f"{URL}: failed 4 times, the last time with {cause}")
    assert len(server.pauses) == 3


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422, 301])
def test_a_refusal_is_not_tried_again(status: int) -> None:
    server = Server(httpx.Response(status, json={"detail": "not like this"}))
    with server.client(retries=3) as client, pytest.raises(RetrievalError, match=f"{status}.*not like this"):
        client.search(["q"], 1)
    assert server.pauses == []


def test_retry_after_is_honoured_up_to_a_cap() -> None:
    def later(seconds: str) -> httpx.Response:
        return httpx.Response(429, headers={"Retry-After": seconds})

    server = Server(later("7"), later("86400"), later("Wed, 21 Oct 2015 07:28:00 GMT"), later("soon"), GOOD)
    with server.client(retries=4) as client:
        client.search(["q"], 1)
    assert server.pauses[:2] == [7.0, LONGEST_PAUSE]
    assert FIRST_PAUSE * 2 <= server.pauses[2] <= FIRST_PAUSE * 4, "a past date is no leave to ask at once"
    assert FIRST_PAUSE * 4 <= server.pauses[3] <= FIRST_PAUSE * 8


def test_retry_after_dates() -> None:
    date = "Wed, 21 Oct 2015 07:28:00 GMT"
    assert retry_after(date, now=lambda: 1445412480.0 - 12) == 12
    assert retry_after(None) is retry_after("") is retry_after("-1 fortnight") is None


@given(attempt=st.integers(0, 5000), asked=st.none() | st.floats(0, 1e9), seed=st.integers())
def test_pauses_are_bounded(attempt: int, asked: float | None, seed: int) -> None:
    assert 0 <= pause(attempt, asked, random.Random(seed)) <= LONGEST_PAUSE


def test_retries_leave_the_global_random_numbers_alone() -> None:
    random.seed(1)
    expected = random.Random(1).random()
    server = Server(500, GOOD)
    with server.client(jitter=None) as client:
        client.search(["q"], 1)
    assert random.random() == expected


def document(**change: object) -> dict[str, object]:
    return {"document": {"id": "1", "contents": "x"} | change, "score": 1.0}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({}, "expected an object with a list 'result'"),
        ([], "expected an object with a list 'result'"),
        ({"result": None}, "expected an object with a list 'result'"),
        ({"result": []}, "1 queries, but 0 results"),
        ({"result": [[], []]}, "1 queries, but 2 results"),
        ({"result": [{}]}, "result.0: expected a list of documents"),
        ({"result": [["x"]]}, "result.0.0: expected an object"),
        (
            {"result": [[{"id": "1", "contents": "x"}]]},
            "result.0.0: expected an object with an object 'document'",
        ),
        (
            {"result": [[document(), document(contents=None)]]},
            "result.0.1.document.contents: expected a text",
        ),
        ({"result": [[document(id=[1])]]}, "result.0.0.document.id"),
        ({"result": [[document() | {"score": "high"}]]}, "result.0.0.score: expected a finite number"),
        ({"result": [[document() | {"score": None}]]}, "result.0.0.score: expected a finite number"),
        ({"result": [[document() | {"score": 10**400}]]}, "too large"),
    ],
)
def test_an_answer_of_the_wrong_shape_is_a_failure(answer: object, message: str) -> None:
    server = Server(answer)
    with server.client() as client, pytest.raises(RetrievalError) as caught:
        client.search(["q"], 3)
    assert f"{URL}: not a /retrieve answer: " in str(caught.value)
    assert message in str(caught.value)
    assert server.pauses == []


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b'{"result": [[', b"\xff", b'{"result": [[{"document": NaN}]]}', b"[" * 9**5]
)
def test_an_answer_that_is_no_json_is_a_failure(body: bytes) -> None:
    with Server(httpx.Response(200, content=body)).client() as client, pytest.raises(RetrievalError):
        client.search(["q"], 3)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4)
        ),
        max_leaves=12,
    )
)
def test_any_json_is_parsed_or_refused(body: object) -> None:
    response = httpx.Response(200, content=json.dumps(body).encode())
    try:
        [found] = parse_answer(response, queries=1, topk=2)
    except ValueError:
        return
    assert len(found) <= 2
    assert all(isinstance(d.id, str) and isinstance(d.contents, str) and d.score == d.score for d in found)


def test_what_other_services_send_is_read() -> None:
    bare = {"document": {"contents": "half \ud800 pair"}}
    numbered = {"document": {"id": 12, "contents": "y", "title": "more"}, "score": -1}
    body = json.dumps({"result": [[bare, numbered, numbered]]}).encode()
    with Server(httpx.Response(200, content=body)).client() as client:
        [[first, second]] = client.search(["q"], 2)
    assert (first.contents, first.score, len(first.id)) == ("half ? pair", 0.0, 16)
    assert second == Document("12", "y", -1.0)


def test_a_query_that_utf8_cannot_spell_is_mended() -> None:
    server = Server(GOOD)
    with server.client() as client:
        client.search(["caf\ud800é"], 1)
    assert server.bodies[0]["queries"] == ["caf?é"]


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/retrieve"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000/retrieve"),
        ("http://127.0.0.1:8000/retrieve", "http://127.0.0.1:8000/retrieve"),
        ("https://search.test/v1/retrieve", "https://search.test/v1/retrieve"),
    ],
)
def test_endpoint(url: str, expected: str) -> None:
    assert str(endpoint(url)) == expected


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:8000", "ftp://search.test", "http://", "http://a:b:c/", "file:///etc/x"]
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="retriever url"):
        RemoteRetriever(url)


def test_a_secret_in_the_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match=TOKEN_VARIABLE) as caught:
        RemoteRetriever("http://me:hunter2@search.test/")
    assert "hunter2" not in str(caught.value)


def test_topk_below_one_is_refused() -> None:
    with Server().client() as client, pytest.raises(ConfigError, match="topk is 0"):
        client.search(["q"], 0)


def test_the_digest_is_the_address() -> None:
    with RemoteRetriever("http://a.test") as a, RemoteRetriever("http://a.test/retrieve") as same:
        assert a.digest == same.digest
    with RemoteRetriever("http://b.test") as b:
        assert a.digest != b.digest


@contextmanager
def raw_server(handle: Callable[[socket.socket], None]) -> Iterator[tuple[str, list[int]]]:
    """A real socket that treats each connection as `handle` does; counts them."""
    seen: list[int] = []

    def loop() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with connection:
                seen.append(1)
                handle(connection)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=loop)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}", seen
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join(10)


def cut_off(connection: socket.socket) -> None:
    connection.recv(65536)
    connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"result": [[')


@pytest.mark.parametrize(
    "handle", [lambda connection: None, lambda connection: connection.recv(65536), cut_off]
)
def test_a_server_that_dies_in_the_middle(handle: Callable[[socket.socket], None]) -> None:
    with raw_server(handle) as (url, seen):
        with (
            RemoteRetriever(url, retries=2, sleep=lambda seconds: None) as client,
            pytest.raises(RetrievalError, match="failed 3 times"),
        ):
            client.search(["q"], 1)
        assert len(seen) == 3


def test_a_server_that_never_answers_times_out() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        RemoteRetriever(
            f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.05, retries=1, sleep=lambda seconds: None
        ) as client,
        pytest.raises(RetrievalError, match="failed 2 times, the last time with ReadTimeout"),
    ):
        client.search(["q"], 1)


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    with RemoteRetriever(url, retries=0) as client, pytest.raises(RetrievalError, match="ConnectError"):
        client.search(["q"], 1)
