"""Addresses as people give them: with a final slash, of a page, of nobody."""

import logging
import socket

import pytest

from rexrag.errors import ConfigError, RetrievalError
from rexrag.retrieval.http.client import RemoteRetriever
from rexrag.retrieval.http.service import create_app
from rexrag.retrieval.rankers.bm25 import BM25Retriever
from rexrag.types import Document
from tests.support.attacks import answer, peer, read_request, rexrag
from tests.support.live_service import running

GOOD = b'{"result": [[{"document": {"id": "1", "contents": "x"}, "score": 1}]]}'


@pytest.fixture
def retriever() -> BM25Retriever:
    return BM25Retriever.build([Document("7", '"Kiln"\nA kiln is an oven.')])


def test_a_final_slash_is_the_same_address(retriever: BM25Retriever) -> None:
    with running(create_app(retriever)) as url, RemoteRetriever(f"{url}/retrieve/", retries=0) as client:
        assert client.search(["kiln"], 1)[0][0].id == "7"


def test_a_redirect_on_the_same_host_is_followed() -> None:
    def handle(connection: socket.socket) -> None:
        connection.sendall(
            b"HTTP/1.1 307 Temporary Redirect\r\nLocation: /retrieve\r\nContent-Length: 0\r\n\r\n"
        )
        assert read_request(connection).startswith(b"POST /retrieve HTTP")
        answer(GOOD, headers=[f"Content-Length: {len(GOOD)}"])(connection)

    with peer(handle) as url, RemoteRetriever(f"{url}/retrieve/", retries=0) as client:
        assert client.search(["q"], 1)[0][0].id == "1"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_elsewhere_is_named_and_gets_no_token(status: int) -> None:
    def handle(connection: socket.socket) -> None:
        head = f"HTTP/1.1 {status} X\r\nLocation: http://other.invalid/retrieve\r\nContent-Length: 0\r\n\r\n"
        connection.sendall(head.encode())

    with (
        peer(handle) as url,
        RemoteRetriever(url, retries=0, token="secret") as client,
        pytest.raises(RetrievalError, match=rf"status {status}: redirects to http://other.invalid/retr"),
    ):
        client.search(["q"], 1)


def test_a_page_instead_of_json_is_quoted() -> None:
    page = b"<html><title>Sign in</title></html>"

    def handle(connection: socket.socket) -> None:
        head = f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: {len(page)}\r\n\r\n"
        connection.sendall(head.encode() + page)

    with (
        peer(handle) as url,
        RemoteRetriever(url, retries=0) as client,
        pytest.raises(RetrievalError, match="expected JSON, got text/html: '<html><title>Sign in"),
    ):
        client.search(["q"], 1)


def test_nobody_at_the_address_is_said_at_once_and_then_now_and_then(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    lines: list[int] = []
    with (
        caplog.at_level(logging.WARNING),
        RemoteRetriever(url, retries=4, sleep=lambda seconds: lines.append(len(caplog.records))) as client,
        pytest.raises(RetrievalError, match="failed 5 times"),
    ):
        client.search(["q"], 1)
    assert lines == [1, 1, 1, 1], "said before the first pause, then not for each of them"
    assert "ConnectError" in caplog.text and "trying again, 4 times at most" in caplog.text


@pytest.mark.parametrize(
    ("variable", "value"), [("ALL_PROXY", "socks5://127.0.0.1:1080"), ("NO_PROXY", "localhost,fe80::/10")]
)
def test_odd_proxy_settings_are_one_line_that_names_the_variable(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError) as caught:
        RemoteRetriever("http://retriever.invalid:8000")
    assert f"${variable}" in str(caught.value) and "\n" not in str(caught.value)
    RemoteRetriever("http://127.0.0.1:8000").close()  # no proxy is asked on the way to this machine


def test_a_corpus_that_is_served_names_the_command_that_indexes_it(tmp_path) -> None:
    corpus = tmp_path / "wiki.jsonl"
    corpus.write_text('{"id": "1", "contents": "x"}\n')
    for words in (["serve", corpus], ["retrieve", "x", "--index", corpus]):
        done = rexrag(*words)
        assert done.returncode == 2
        assert f"rexrag index build {corpus} --out wiki-index" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_found_passages_are_shown_with_their_ids(tmp_path) -> None:
    corpus = tmp_path / "wiki.jsonl"
    corpus.write_text('{"id": "d-7", "contents": "\\"Kiln\\"\\nA kiln is an oven."}\n')
    assert "[d-7] Kiln: A kiln is an oven." in rexrag("retrieve", "kiln", "--corpus", corpus).stdout
