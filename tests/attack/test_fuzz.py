"""Random input to what the retrieval layer reads: an answer, or an error of ours in one line."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rexrag.errors import ConfigError, DataError
from rexrag.http import first_words, is_loopback, parse_address
from rexrag.io import FieldError
from rexrag.retrieval.corpus import ID_FIELDS, parse_document, read_corpus
from rexrag.retrieval.http.service import create_app
from rexrag.retrieval.rankers.bm25 import SPACED, UNSPACED, BM25Retriever, has_unspaced, split_words
from rexrag.types import Document
from tests.support.live_service import running

CASES = [500, pytest.param(5_000, marks=pytest.mark.slow)]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.sampled_from([*ID_FIELDS, "contents", "title", "text", "metadata"])


def often(cases: int):
    """So many examples, the same ones each time."""
    return settings(
        max_examples=cases,
        derandomize=True,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@pytest.mark.parametrize("cases", CASES)
def test_any_row_is_a_document_or_names_its_field(cases: int) -> None:
    @often(cases)
    @given(st.dictionaries(FIELDS, JSON, max_size=6))
    def check(row: dict[str, object]) -> None:
        try:
            document = parse_document(7, row)
        except FieldError as error:
            assert error.field and "\n" not in str(error)
            return
        assert document.id and document.contents.strip()
        document.contents.encode()

    check()


@pytest.mark.parametrize("cases", CASES)
def test_any_bytes_are_a_corpus_or_one_line(cases: int, tmp_path: Path) -> None:
    begin = st.sampled_from(
        [b"", b'{"id": 1, "text": "x"}\n', b"\x1f\x8b\x08\x00", b"\x28\xb5\x2f\xfd", b"BZh9"]
    )

    @often(cases)
    @given(begin, st.binary(max_size=200))
    def check(start: bytes, rest: bytes) -> None:
        path = tmp_path / "c.jsonl"
        path.write_bytes(start + rest)
        try:
            assert list(read_corpus(path))
        except DataError as error:
            assert str(error).startswith(str(path))

    check()


@pytest.mark.parametrize("cases", CASES)
def test_both_splitters_agree_on_scripts_with_spaces_and_find_any_text_by_itself(cases: int) -> None:
    @often(cases)
    @given(st.text(st.characters(codec="utf-8"), max_size=60))
    def check(text: str) -> None:
        words = split_words(text, UNSPACED)
        assert has_unspaced(text) or words == split_words(text, SPACED)
        found = BM25Retriever.build([Document("0", "ada " + text)]).search([text], 1)[0]
        assert bool(found) == bool(words)

    check()


@pytest.mark.parametrize("cases", CASES)
def test_any_address_is_taken_or_refused_with_its_name(cases: int) -> None:
    @often(cases)
    @given(st.sampled_from(["", "http://", "https://", "http://a:b@", "http://["]), st.text(max_size=30))
    def check(begin: str, rest: str) -> None:
        is_loopback(rest)
        try:
            assert parse_address(begin + rest, "retriever url", "TOKEN", "http://x").host
        except ConfigError as error:
            assert "retriever url" in str(error)

    check()


@pytest.mark.parametrize("cases", CASES)
def test_what_is_quoted_of_an_answer_is_one_short_printable_line(cases: int) -> None:
    @often(cases)
    @given(st.binary(max_size=600))
    def check(content: bytes) -> None:
        shown = first_words(httpx.Response(200, content=content))
        assert len(shown) <= 121 and not set(shown) & {"\n", "\r", "\x1b", "\x07"}

    check()


@pytest.fixture(scope="module")
def service() -> Iterator[httpx.Client]:
    with (
        running(create_app(BM25Retriever.build([Document("1", '"Kiln"\nA kiln is an oven.')]))) as url,
        httpx.Client(base_url=url, trust_env=False) as http,
    ):
        yield http


@pytest.mark.parametrize("cases", CASES)
def test_any_json_gets_an_answer_or_a_refusal_in_one_line(cases: int, service: httpx.Client) -> None:
    shaped = st.fixed_dictionaries(
        {"queries": st.lists(st.text(max_size=20), max_size=4) | JSON},
        optional={"topk": st.integers(-1, 120) | JSON, "return_scores": st.booleans() | JSON},
    )

    @often(cases)
    @given(shaped | JSON)
    def check(body: object) -> None:
        answer = service.post(
            "/retrieve", content=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
        )
        assert answer.status_code in (200, 422), (answer.status_code, answer.text)
        if answer.status_code == 422:
            assert "\n" not in answer.json()["detail"]

    check()


@pytest.mark.parametrize(
    "body",
    [
        b'{"queries": ["\\ud800"]}',
        b'{"queries": ["kiln \\udfff"], "return_scores": true}',
        b'{"\\ud800": 1}',
        b'{"queries": ["\\u0000\\u001b[2J"]}',
        b'{"queries": ["x"], "topk": 1e400}',
        b'{"queries": ["x"], "topk": 99999999999999999999}',
        b"[" * 100_000,
        b"\xff\xfe",
        b"",
    ],
)
def test_odd_json_gets_an_answer_or_a_refusal(body: bytes, service: httpx.Client) -> None:
    answer = service.post("/retrieve", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400, 422), (answer.status_code, answer.text)
    assert service.get("/health").is_success
