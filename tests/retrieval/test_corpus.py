import json
from pathlib import Path

import pytest

from rexrag.errors import DataError
from rexrag.retrieval.corpus import documents_digest, read_corpus
from rexrag.types import Document


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_both_kinds_of_row_give_the_same_document(tmp_path: Path) -> None:
    one = write(tmp_path / "a.jsonl", {"id": "7", "contents": '"Ada"\nShe wrote.', "more": 1})
    two = write(tmp_path / "b.jsonl", {"id": 7, "title": '"Ada"', "text": "She wrote."})
    assert list(read_corpus(one)) == list(read_corpus(two)) == [Document("7", '"Ada"\nShe wrote.')]
    document = next(read_corpus(two))
    assert (document.title, document.text) == ("Ada", "She wrote.")


def test_a_missing_id_is_the_row_number(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"title": "A", "text": "a"}, {"title": "B", "text": "b"})
    assert [document.id for document in read_corpus(path)] == ["1", "2"]


def test_reading_streams(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"id": 1, "contents": "one"}, {"id": 2})
    rows = read_corpus(path)
    assert next(rows).contents == "one"
    with pytest.raises(DataError):
        next(rows)


@pytest.mark.parametrize(
    ("row", "where"),
    [
        ({"id": "2"}, "field 'contents': missing; expected `contents` or `text`, the row's fields are: id"),
        ({"id": "2", "contents": ["x"]}, "field 'contents': expected a text, got list ['x']"),
        ({"id": "2", "contents": " "}, "field 'contents': expected a text that is not blank"),
        ({"id": "2", "contents": "\ud83d"}, "field 'contents': expected valid Unicode"),
        ({"id": "2", "title": "T", "body": "b"}, "the row's fields are: id, title, body"),
        ({"id": "2", "text": ["t"]}, "field 'text': expected a text, got list ['t']"),
        ({"id": "2", "title": 3, "text": "t"}, "field 'title': expected a text, got int 3"),
        ({"id": "2", "title": " ", "text": " "}, "field 'text': expected a text that is not blank"),
        ({"id": 1.5, "contents": "x"}, "field 'id': expected a text or a whole number, got float 1.5"),
        ({"id": "1", "contents": "x"}, "field 'id': '1' was seen before"),
        (["2", "x"], "expected a JSON object, got list"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: object, where: str) -> None:
    path = write(tmp_path / "a.jsonl", {"id": "1", "contents": "fine"}, row)
    with pytest.raises(DataError) as caught:
        list(read_corpus(path))
    assert str(caught.value).startswith(f"{path}, row 2")
    assert where in str(caught.value)


def test_an_empty_corpus_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n")
    with pytest.raises(DataError, match="the corpus is empty"):
        list(read_corpus(path))


def test_the_digest_knows_ids_contents_and_order_but_no_scores() -> None:
    a, b = Document("1", "x"), Document("2", "y")
    assert documents_digest([a, b]) == documents_digest(iter([Document("1", "x", score=3.0), b]))
    others = [[b, a], [a], [a, Document("2", "z")], [a, Document("3", "y")], [Document("1x", ""), b]]
    assert len({documents_digest(other) for other in [[a, b], *others]}) == len(others) + 1


@pytest.mark.parametrize(("folder", "count"), [("2wiki", 6119), ("wiki18_nq", 2923)])
def test_real_corpora_are_read(shared: Path, folder: str, count: int) -> None:
    documents = list(read_corpus(shared / "data" / folder / "corpus.jsonl"))
    assert len(documents) == count
    assert all(document.title and document.text for document in documents)
