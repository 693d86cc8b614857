"""A retriever of the user's own: what fails, or is no list of documents, is one line with its name."""

import pytest

from rexrag.errors import PluginError, RetrievalError
from rexrag.retrieval.plugin import checked_retriever, load_retriever
from rexrag.types import Document

FOUND = [Document("1", "Paris")]


class Searches:
    def __init__(self, search):
        self.by = search

    def search(self, queries, topk):
        return self.by(queries)


def fails(queries):
    raise TimeoutError("took too long\nsecond line")


@pytest.mark.parametrize(
    ("search", "says"),
    [
        (fails, "TimeoutError: took too long"),
        (lambda queries: [None], "returned None for a query, expected a list of Document"),
        (lambda queries: [iter(FOUND)], "returned a list_iterator for a query, expected a list of Document"),
        (
            lambda queries: [(d for d in FOUND)],
            "returned a generator for a query, expected a list of Document",
        ),
        (lambda queries: ["Paris"], "returned a str for a query, expected a list of Document"),
        (lambda queries: [["Paris"]], "returned a str, expected Document"),
        (lambda queries: [], "returned 0 lists for 1 queries"),
        (lambda queries: None, "returned NoneType for 1 queries"),
    ],
)
def test_a_search_that_cannot_be_used_is_one_line(search, says):
    with pytest.raises(PluginError) as caught:
        checked_retriever(Searches(search), "my:retriever").search(["where"], 2)
    assert str(caught.value) == f"retriever my:retriever: {says}"


def test_a_search_that_failed_after_every_retry_stays_what_it_is():
    def down(queries):
        raise RetrievalError("the service is down")

    with pytest.raises(RetrievalError, match=r"^the service is down$"):
        checked_retriever(Searches(down)).search(["where"], 2)


def test_documents_pass():
    assert checked_retriever(Searches(lambda queries: [FOUND])).search(["where"], 2) == [FOUND]


def test_a_constructor_that_fails_is_one_line():
    with pytest.raises(PluginError) as caught:
        load_retriever("tests.support.plugins:fails_to_start")
    name = "tests.support.plugins:fails_to_start"
    assert str(caught.value) == f"retriever.plugin = '{name}': OSError: no index here"


def test_a_digest_that_fails_is_one_line():
    class NoDigest(Searches):
        @property
        def digest(self):
            raise OSError("gone")

    with pytest.raises(PluginError, match=r"^retriever my:retriever, digest: OSError: gone$"):
        _ = checked_retriever(NoDigest(fails), "my:retriever").digest
