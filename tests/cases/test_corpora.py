"""Corpora as they are published: without titles, packed, in scripts without spaces."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from rexrag.errors import DataError
from rexrag.io import LINE_BYTES, read_jsonl, read_lines
from rexrag.retrieval.corpus import read_corpus
from rexrag.retrieval.index.build import BuildOptions, build_index
from rexrag.retrieval.index.estimate import estimate
from rexrag.retrieval.index.folder import load_index
from rexrag.retrieval.rankers.bm25 import SPACED, UNSPACED, BM25Retriever
from rexrag.types import Document
from tests.support.attacks import rexrag

CJK = [
    ("东京", "东京是日本的首都。"),
    ("北京", "北京是中国的首都。"),
    ("القاهرة", "القاهرة هي عاصمة مصر."),
    ("Café Montréal", "Le café de Montréal est fermé."),
    ("Emoji", "🍕 pizza is loved 🎉"),
    ("हिन्दी", "दिल्ली भारत की राजधानी है।"),
    ("ไทย", "กรุงเทพเป็นเมืองหลวงของประเทศไทย"),
]
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "zst": zstandard.ZstdCompressor().compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
}


def write(path: Path, *rows: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def cjk(tmp_path: Path) -> Path:
    rows = ({"id": str(i), "contents": f"{title}\n{text}"} for i, (title, text) in enumerate(CJK))
    return write(tmp_path / "cjk.jsonl", *rows)


def test_beir_rows_are_read_with_their_ids_and_without_titles(tmp_path: Path) -> None:
    path = write(
        tmp_path / "c.jsonl",
        {"_id": "d1", "title": "Heat pump", "text": "A heat pump moves heat.", "metadata": {}},
        {"_id": "d2", "title": "", "text": "An untitled page about kilns.", "metadata": {}},
        {"_id": "d3", "title": "Only a title", "text": "", "metadata": {}},
    )
    documents = list(read_corpus(path))
    assert [(d.id, d.title, d.text) for d in documents] == [
        ("d1", "Heat pump", "A heat pump moves heat."),
        ("d2", "", "An untitled page about kilns."),
        ("d3", "Only a title", ""),
    ]
    build_index(path, tmp_path / "index", BuildOptions())
    assert load_index(tmp_path / "index").search(["kilns"], 1)[0][0].id == "d2"


@pytest.mark.parametrize("field", ["id", "_id", "docid", "doc_id", "pid"])
def test_rows_of_text_only_keep_their_id(tmp_path: Path, field: str) -> None:
    path = write(tmp_path / "c.jsonl", {field: "x7", "text": "An untitled page\nabout kilns."})
    assert list(read_corpus(path)) == [Document("x7", '""\nAn untitled page\nabout kilns.')]


@pytest.mark.parametrize("kind", PACKERS)
@pytest.mark.parametrize("name", ["corpus.jsonl.{}", "corpus"])
def test_packed_corpora_are_read_whatever_they_are_called(tmp_path: Path, kind: str, name: str) -> None:
    rows = b"".join(b'{"id": %d, "contents": "kiln number%d"}\n' % (i, i) for i in range(3000))
    path = tmp_path / name.format(kind)
    path.write_bytes(PACKERS[kind](rows))
    assert len(list(read_corpus(path))) == 3000
    needs = estimate(path, tmp_path / "index", BuildOptions())
    assert 1000 < needs.documents < 9000, "a packed file is counted roughly"
    build_index(path, tmp_path / "index", BuildOptions())
    assert load_index(tmp_path / "index").search(["number2999"], 1)[0][0].id == "2999"


@pytest.mark.parametrize("kind", PACKERS)
def test_packed_in_two_pieces_is_read_whole(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(PACKERS[kind](b'{"id": 1, "text": "a"}\n') + PACKERS[kind](b'{"id": 2, "text": "b"}\n'))
    assert [document.id for document in read_corpus(path)] == ["1", "2"]


@pytest.mark.parametrize("kind", PACKERS)
def test_a_packed_file_that_is_cut_or_damaged_is_one_line(tmp_path: Path, kind: str) -> None:
    rows = b"".join(b'{"id": %d, "contents": "kiln %d"}\n' % (i, i * 7919) for i in range(3000))
    packed = PACKERS[kind](rows)
    path = tmp_path / "c.jsonl"
    middle = len(packed) // 2
    for damaged in (packed[:middle], packed[:middle] + b"\0" * 64 + packed[middle + 64 :], packed[:6]):
        path.write_bytes(damaged)
        with pytest.raises(DataError) as caught:
            list(read_corpus(path))
        assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", PACKERS)
@pytest.mark.parametrize("read", [read_jsonl, read_lines])
def test_a_packed_line_without_end_is_refused(tmp_path: Path, kind: str, read: Callable) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(PACKERS[kind](b" " * (LINE_BYTES + 2)))
    with pytest.raises(DataError, match=r"row 1: a line of more than 67,108,864 bytes"):
        list(read(path))


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("首都", {"0", "1"}),
        ("日本", {"0"}),
        ("京", {"0", "1"}),
        ("中国的首都是哪里", {"1"}),
        ("กรุงเทพ", {"6"}),
        ("القاهرة", {"2"}),
        ("दिल्ली", {"5"}),
        ("cafe montreal", {"3"}),
        ("🍕", set()),
    ],
)
@pytest.mark.parametrize("kind", ["bm25", "bm25-disk"])
def test_words_of_scripts_without_spaces_are_found(
    cjk: Path, tmp_path: Path, kind: str, query: str, found: set[str]
) -> None:
    build_index(cjk, tmp_path / "index", BuildOptions(kind=kind))
    answers = [document.id for document in load_index(tmp_path / "index").search([query], 7)[0]]
    assert set(answers[: len(found)]) == found
    assert answers or not found


def test_such_a_corpus_is_warned_about_when_it_is_indexed(cjk: Path, tmp_path: Path) -> None:
    done = rexrag("index", "build", cjk, "--out", tmp_path / "index")
    assert (
        done.returncode == 0 and "warning: parts of the corpus are in a script without spaces" in done.stderr
    )
    assert "[0]" in rexrag("retrieve", "首都", "--corpus", cjk).stdout


def test_a_corpus_without_such_a_script_keeps_the_identity_of_its_index() -> None:
    plain = BM25Retriever.build([Document("1", "Straße Москва café")])
    mixed = BM25Retriever.build([Document("1", "Straße Москва café 首都")])
    assert plain.ranker.identity["words"] == SPACED
    assert mixed.ranker.identity["words"] == UNSPACED


def test_odd_output_encodings_are_no_traceback(cjk: Path) -> None:
    for encoding in ("ascii", "latin-1"):
        done = rexrag("retrieve", "首都", "--corpus", cjk, PYTHONIOENCODING=encoding)
        assert "Traceback" not in done.stderr
