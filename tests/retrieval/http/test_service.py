"""The service speaks Search-R1's protocol, refuses what it cannot serve, and /health always answers."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest

from rexrag.errors import ConfigError, RetrievalError
from rexrag.http import TOKEN_VARIABLE, is_loopback
from rexrag.retrieval.http.service import Limits, check_exposure, create_app, listen, serve
from rexrag.retrieval.index.folder import save_index
from rexrag.retrieval.rankers.bm25 import BM25Retriever
from rexrag.types import Document
from tests.support.live_service import running


@pytest.fixture
def http(retriever: BM25Retriever) -> Iterator[httpx.Client]:
    app = create_app(retriever, limits=Limits(queries=4, query_characters=50, topk=5, body_bytes=500))
    with running(app) as url, httpx.Client(base_url=url, trust_env=False) as client:
        yield client


def test_the_exact_exchange(http: httpx.Client, documents: list[Document]) -> None:
    body = {"queries": ["capital of England", "zyxwv"], "topk": 1, "return_scores": True}
    answer = http.post("/retrieve", json=body)
    assert answer.status_code == 200
    [[entry], nothing] = answer.json()["result"]
    assert nothing == []
    assert set(entry) == {"document", "score"}
    assert entry["document"] == {"id": "d2", "contents": documents[2].contents}
    assert entry["score"] > 0


def test_bare_documents_without_scores(http: httpx.Client, documents: list[Document]) -> None:
    for flag in ({"return_scores": False}, {}):
        answer = http.post("/retrieve", json={"queries": ["Thames"], "topk": 1, **flag})
        assert answer.json() == {"result": [[{"id": "d2", "contents": documents[2].contents}]]}


def test_no_queries_no_results_and_topk_has_a_default(http: httpx.Client) -> None:
    assert http.post("/retrieve", json={"queries": [], "topk": 3}).json() == {"result": []}
    for body in (
        {"queries": ["engine London Mapy chapel"]},
        {"queries": ["engine London Mapy chapel"], "topk": None},
    ):
        assert len(http.post("/retrieve", json=body).json()["result"][0]) == 3


def test_health(http: httpx.Client, retriever: BM25Retriever) -> None:
    assert http.get("/health").json() == {"status": "ok", "digest": retriever.digest}


@pytest.mark.parametrize(
    ("body", "status", "detail"),
    [
        ({"queries": ["a"] * 5}, 422, "queries: 5 given, at most 4 are taken"),
        ({"queries": ["a", "b" * 51]}, 422, "queries.1: 51 characters, at most 50 are taken"),
        ({"queries": ["a"], "topk": 6}, 422, "topk: 6 given, expected 1 to 5"),
        ({"queries": ["a"], "topk": 0}, 422, "topk: 0 given, expected 1 to 5"),
        ({"queries": ["a"], "topk": -1}, 422, "topk: -1 given, expected 1 to 5"),
        ({"queries": "a"}, 422, "body.queries: Input should be a valid list"),
        ({"queries": ["a", 3]}, 422, "body.queries.1: Input should be a valid string"),
        ({}, 422, "body.queries: Field required"),
        ({"queries": ["a"] * 400}, 413, "body of 1613 bytes, at most 500 are taken"),
    ],
)
def test_requests_out_of_bounds_are_refused(
    http: httpx.Client, body: object, status: int, detail: str
) -> None:
    answer = http.post("/retrieve", json=body)
    assert (answer.status_code, answer.json()) == (status, {"detail": detail})


def test_bodies_that_are_not_json_or_have_no_length_are_refused(http: httpx.Client) -> None:
    kind = {"Content-Type": "application/json"}
    assert http.post("/retrieve", content=b"{", headers=kind).status_code == 422
    chunked = http.post("/retrieve", content=iter([b"{}"]), headers=kind)
    assert (chunked.status_code, chunked.json()) == (411, {"detail": "expected a Content-Length"})
    assert http.get("/retrieve").status_code == 405


def test_a_token_guards_retrieve(retriever: BM25Retriever) -> None:
    with (
        running(create_app(retriever, token="s3cret")) as url,
        httpx.Client(base_url=url, trust_env=False) as http,
    ):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}):
            assert http.post("/retrieve", json={"queries": []}, headers=headers).status_code == 401
        right = http.post("/retrieve", json={"queries": []}, headers={"Authorization": "Bearer s3cret"})
        assert right.json() == {"result": []}
        assert http.get("/health").status_code == 200
        assert http.get("/metrics").status_code == 401
        for host in ("x/health?", "localhost/health?"):
            forged = http.post("/retrieve", json={"queries": []}, headers={"Host": host})
            assert forged.status_code in (400, 401, 421), "who may ask is not for the client's headers to say"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_an_answer_waits_for_no_acknowledgement(host: str) -> None:
    """Nagle's algorithm would hold each body back until the client's delayed acknowledgement, 40 ms later."""
    try:
        listening = listen(host, 0)
    except ConfigError:
        pytest.skip(f"{host} is not there")
    with listening, socket.create_connection(listening.getsockname()[:2]):
        connection, _ = listening.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_requests_are_counted_by_status(http: httpx.Client) -> None:
    for body in ({"queries": ["Thames"]}, {"queries": ["a"] * 5}, {"queries": ["a"] * 400}):
        http.post("/retrieve", json=body)
    http.get("/health")
    rows = http.get("/metrics").text.splitlines()
    counted = [row for row in rows if row.startswith("rexrag_requests_total")]
    assert counted == [f'rexrag_requests_total{{status="{status}"}} 1.0' for status in (200, 422, 413)]
    assert "rexrag_request_seconds_count 3.0" in rows


class Stuck:
    """A retriever that searches until it is let go, then fails."""

    digest = "stuck"

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.release = threading.Event()

    def search(self, queries: Sequence[str], topk: int) -> list[list[Document]]:
        self.begun.set()
        assert self.release.wait(10)
        raise RetrievalError("the index is on fire")


def test_health_answers_during_a_search_and_a_failure_is_no_empty_result() -> None:
    stuck, answers = Stuck(), []
    with running(create_app(stuck)) as url, httpx.Client(base_url=url, trust_env=False, timeout=10) as http:
        search = threading.Thread(
            target=lambda: answers.append(http.post("/retrieve", json={"queries": ["a"]}))
        )
        search.start()
        assert stuck.begun.wait(10)
        assert http.get("/health").json()["status"] == "ok"
        assert not answers
        stuck.release.set()
        search.join(10)
    assert answers[0].status_code == 502
    assert answers[0].json() == {"detail": "the index is on fire"}


def search_r1_turn(url: str, queries: list[str], topk: int) -> list[str]:
    """What Search-R1's generation loop does: one POST, then title and text of each document."""
    body = json.dumps({"queries": queries, "topk": topk, "return_scores": True}).encode()
    request = urllib.request.Request(f"{url}/retrieve", body, {"Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10) as response:
        results = json.loads(response.read())["result"]
    texts = []
    for result in results:
        text = ""
        for number, entry in enumerate(result, 1):
            title, *rest = entry["document"]["contents"].split("\n")
            text += f"Doc {number}(Title: {title}) " + "\n".join(rest) + "\n"
        texts.append(text)
    return texts


def test_a_search_r1_client_reads_the_answers(retriever: BM25Retriever) -> None:
    with running(create_app(retriever)) as url:
        texts = search_r1_turn(url, ["Analytical Engine designed", "nothing-of-the-kind"], 2)
        with pytest.raises(urllib.error.HTTPError, match="422"):
            search_r1_turn(url, ["x"], 1000)
    assert texts == [
        'Doc 1(Title: "Charles Babbage") Charles Babbage designed the Analytical Engine in London.\n'
        'Doc 2(Title: "Ada Lovelace") Ada Lovelace wrote the first program for the Analytical Engine.\n',
        "",
    ]


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("", False),
        ("192.168.0.7", False),
        ("localhost.example.org", False),
        ("127.0.0.1.example.org", False),
    ],
)
def test_only_loopback_goes_without_a_token(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback
    check_exposure(host, "correct horse battery staple")
    if loopback:
        check_exposure(host, None)
        check_exposure(host, "x")
    else:
        with pytest.raises(ConfigError, match=TOKEN_VARIABLE):
            check_exposure(host, None)
        for weak in ("x", "short token", "a" * 40, "abcabcabcabcabcabc"):
            with pytest.raises(ConfigError, match="easily guessed"):
                check_exposure(host, weak)


def test_serve_refuses_before_it_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with pytest.raises(ConfigError, match="reached from other machines"):
        serve(tmp_path, host="0.0.0.0")


def test_a_taken_or_impossible_port_is_named() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1, port {port}"):
            listen("127.0.0.1", port)
    with pytest.raises(ConfigError, match="port is 70000"):
        listen("127.0.0.1", 70_000)


def test_serve_runs_until_interrupted(retriever: BM25Retriever, tmp_path: Path) -> None:
    folder = save_index(retriever, tmp_path / "index")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    code = (
        "import sys; from rexrag.retrieval.http.service import serve; "
        "serve(sys.argv[1], port=int(sys.argv[2]))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", code, str(folder), str(port)], env=environment)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
            until = time.monotonic() + 60
            while time.monotonic() < until:
                try:
                    assert http.get("/health").json()["digest"] == retriever.digest
                    break
                except httpx.ConnectError:
                    time.sleep(0.05)
            found = http.post("/retrieve", json={"queries": ["Thames"], "topk": 1}).json()
        assert found["result"][0][0]["id"] == "d2"
        process.send_signal(2)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
