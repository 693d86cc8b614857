"""The ranking is BM25 as the formula says, ties are settled, and nothing is found where nothing matches."""

import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rexrag.errors import ConfigError, DataError
from rexrag.retrieval.rankers.bm25 import (
    SPACED,
    BM25Options,
    BM25Retriever,
    best_places,
    has_unspaced,
    split_words,
)
from rexrag.types import Document

WORDS = ["ada", "engine", "london", "river", "chapel", "mayor", "berlin"]
STOPS = ["the", "of", "and"]
texts = st.lists(st.sampled_from(WORDS + STOPS), min_size=1, max_size=12).map(" ".join)


def formula(corpus: Sequence[str], query: str, k1: float, b: float) -> list[float]:
    """Lucene's BM25, straight from the page; words are split at spaces."""
    bags = [Counter(w for w in text.split() if w not in STOPS) for text in corpus]
    mean = sum(bag.total() for bag in bags) / len(bags)
    scores = []
    for bag in bags:
        score = 0.0
        for word in (w for w in query.split() if w not in STOPS):
            df = sum(word in other for other in bags)
            idf = math.log(1 + (len(bags) - df + 0.5) / (df + 0.5))
            score += idf * bag[word] / (bag[word] + k1 * (1 - b + b * bag.total() / mean)) if bag[word] else 0
        scores.append(score)
    return scores


def as_documents(corpus: Sequence[str]) -> list[Document]:
    return [Document(str(i), text) for i, text in enumerate(corpus)]


@given(
    corpus=st.lists(texts, min_size=1, max_size=12),
    query=texts,
    k1=st.floats(0.1, 3),
    b=st.floats(0, 1),
    topk=st.integers(1, 15),
)
def test_ranking_is_the_formula(corpus: list[str], query: str, k1: float, b: float, topk: int) -> None:
    if not any(word in WORDS for text in corpus for word in text.split()):
        corpus = [*corpus, "ada"]
    expected = formula(corpus, query, k1, b)
    [found] = BM25Retriever.build(as_documents(corpus), BM25Options(k1, b)).search([query], topk)
    places = [int(document.id) for document in found]

    assert len(places) == len(set(places)) == min(topk, sum(score > 0 for score in expected))
    assert [document.score for document in found] == pytest.approx([expected[i] for i in places], rel=1e-5)
    # Best first, and nothing better was left out; float32 may swap documents closer than this.
    near = 1e-5
    assert all(expected[i] >= expected[j] - near for i, j in pairwise(places))
    left = [score for i, score in enumerate(expected) if i not in places]
    assert not places or all(expected[places[-1]] >= score - near for score in left)
    for i, j in pairwise(places):
        assert corpus[i] != corpus[j] or i < j


def test_exact_ranking_of_a_small_corpus() -> None:
    corpus = ["ada engine", "engine engine london", "london river", "river river river ada", "mayor"]
    retriever = BM25Retriever.build(as_documents(corpus))
    for query in ("engine", "ada river", "london engine engine", "the mayor of london"):
        scores = formula(corpus, query, 1.2, 0.75)
        expected = sorted((i for i in range(5) if scores[i] > 0), key=lambda i: (-scores[i], i))
        assert [int(document.id) for document in retriever.search([query], 5)[0]] == expected


@given(
    scores=st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=30),
    topk=st.integers(1, 40),
    block=st.integers(1, 9),
)
def test_best_places_is_a_full_sort_cut_off(scores: list[float], topk: int, block: int) -> None:
    expected = sorted((i for i, s in enumerate(scores) if s > 0), key=lambda i: (-scores[i], i))[:topk]
    with patch("rexrag.retrieval.rankers.bm25.BLOCK", block):
        assert best_places(np.array(scores, dtype=np.float32), topk) == expected


def test_ties_go_by_corpus_order() -> None:
    retriever = BM25Retriever.build([Document(f"{9 - i}", "same words here") for i in range(10)])
    assert [document.id for document in retriever.search(["words"], 4)[0]] == ["9", "8", "7", "6"]


def test_no_document_is_invented(retriever: BM25Retriever) -> None:
    queries = ["the of and", "zyxwv", "", "?! ...", "zyxwv's", "London"]
    found = retriever.search(queries, 3)
    assert found[:5] == [[], [], [], [], []]
    assert [document.id for document in found[5]] == ["d2", "d1"]
    assert retriever.search([], 3) == []


def test_topk_larger_than_the_corpus(retriever: BM25Retriever, documents: list[Document]) -> None:
    [found] = retriever.search(["Analytical Engine London chapel Cortés"], 100)
    assert sorted(document.id for document in found) == [document.id for document in documents]


@pytest.mark.parametrize("topk", [0, -1])
def test_topk_below_one_is_refused(retriever: BM25Retriever, topk: int) -> None:
    with pytest.raises(ConfigError, match="expected at least 1"):
        retriever.search(["x"], topk)


def test_documents_come_back_as_they_went_in(retriever: BM25Retriever, documents: list[Document]) -> None:
    [[first, *_]] = retriever.search(["mapy cortes"], 1)
    assert (first.id, first.contents) == (documents[3].id, documents[3].contents)
    assert first.score > 0


def test_a_batch_is_its_queries_one_by_one(retriever: BM25Retriever) -> None:
    queries = ["engine", "capital of England", "nothingness", "Mary"]
    assert retriever.search(queries, 2) == [retriever.search([query], 2)[0] for query in queries]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The Mayor of LONDON", ["mayor", "london"]),
        ("Cortés Mladá Straße", ["cortes", "mlada", "strasse"]),
        ("Corte\u0301s", ["cortes"]),
        ("Mary's own, King’s; O'Brien", ["mary", "own", "king", "o", "brien"]),
        ("3 Dots (2003)", ["3", "dots", "2003"]),
        ("東京 Москва", ["東", "京", "東京", "москва"]),
        ("iPhone手机, 首", ["iphone", "手", "机", "手机", "首"]),
        (" \n", []),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert split_words(text) == words


@given(st.text())
def test_any_text_can_be_searched_and_splitting_is_stable(text: str) -> None:
    words = split_words(text)
    spaced = split_words(text, SPACED)
    assert split_words(" ".join(spaced), SPACED) == spaced
    assert has_unspaced(text) or words == spaced
    retriever = BM25Retriever.build([Document("0", "ada " + text)])
    assert bool(retriever.search([text], 1)[0]) == bool(words)


@pytest.mark.parametrize(
    ("k1", "b"), [(-1, 0.5), (math.nan, 0.5), (math.inf, 0.5), (1, -0.1), (1, 1.1), (1, math.nan)]
)
def test_options_outside_their_range_are_refused(k1: float, b: float) -> None:
    with pytest.raises(ConfigError, match="expected a number"):
        BM25Options(k1, b)


@pytest.mark.parametrize("documents", [[], [Document("0", "the of"), Document("1", "!")]])
def test_nothing_to_index_is_refused(documents: list[Document]) -> None:
    with pytest.raises(DataError, match="nothing to index"):
        BM25Retriever.build(documents)


def test_a_document_without_words_is_kept_but_never_found() -> None:
    retriever = BM25Retriever.build([Document("0", "the"), Document("1", "ada")])
    assert [[document.id for document in found] for found in retriever.search(["ada the"], 5)] == [["1"]]


def test_the_digest_knows_corpus_and_options(documents: list[Document]) -> None:
    build = BM25Retriever.build
    assert build(documents).digest == build(iter(documents)).digest
    others = [
        build(documents[:-1]),
        build(documents, BM25Options(k1=1.3)),
        build(documents, BM25Options(b=0.5)),
    ]
    assert len({build(documents).digest, *(other.digest for other in others)}) == 4


def test_it_is_silent(documents: list[Document], capfd: pytest.CaptureFixture[str]) -> None:
    BM25Retriever.build(documents).search(["engine"], 2)
    assert capfd.readouterr() == ("", "")


def test_jax_is_not_started_and_can_still_be_imported(tmp_path: Path) -> None:
    # A jax that says when it is imported; the real one then takes most of a GPU's memory.
    package = tmp_path / "jax"
    package.mkdir()
    (package / "__init__.py").write_text("print('jax starts')")
    (package / "lax.py").write_text("def top_k(scores, k): ...")
    code = "import rexrag.retrieval.rankers.bm25; print('there'); import jax.lax"
    paths = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    ran = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert (ran.returncode, ran.stdout.split("\n")) == (0, ["there", "jax starts", ""]), ran.stderr
