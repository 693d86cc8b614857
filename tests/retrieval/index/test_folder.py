"""An index folder gives the same answers as the memory it was saved from, and says when it cannot."""

import json
import mmap
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from rexrag.errors import ConfigError, IndexFolderError
from rexrag.retrieval.corpus import documents_digest, read_corpus
from rexrag.retrieval.index.folder import (
    MANIFEST,
    check_index,
    crc32_file,
    load_index,
    save_index,
)
from rexrag.retrieval.rankers.bm25 import BM25Options, BM25Retriever
from rexrag.types import Document
from tests.support.indexes import edit_manifest

QUERIES = ["analytical engine", "mapy cortes", "capital", "the", "unknownword", "Mary London"]


@pytest.fixture
def folder(retriever: BM25Retriever, tmp_path: Path) -> Path:
    return save_index(retriever, tmp_path / "index")


def test_loaded_equals_saved(retriever: BM25Retriever, folder: Path) -> None:
    loaded = load_index(folder, verify=True)
    assert loaded.search(QUERIES, 3) == retriever.search(QUERIES, 3)
    assert loaded.digest == retriever.digest
    assert len(loaded.documents) == len(retriever.documents)
    assert [loaded.documents[i] for i in range(5)] == list(retriever.documents)
    with pytest.raises(IndexError):
        loaded.documents[5]


def test_real_corpus_saved_and_loaded(shared: Path, tmp_path: Path) -> None:
    corpus = shared / "data" / "wiki18_nq" / "corpus.jsonl"
    built = BM25Retriever.build(read_corpus(corpus))
    loaded = load_index(save_index(built, tmp_path / "index"), documents_digest(read_corpus(corpus)))
    rows = (shared / "data" / "wiki18_nq" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:64]
    questions = [json.loads(row) for row in rows]
    found = loaded.search([question["question"] for question in questions], 3)
    assert found == built.search([question["question"] for question in questions], 3)
    hits = [
        any(
            answer.lower() in document.contents.lower()
            for answer in question["answers"]
            for document in documents
        )
        for question, documents in zip(questions, found, strict=True)
    ]
    # The answer is in the corpus; BM25 finds it in the first three passages nine times in ten.
    assert sum(hits) / len(hits) > 0.8


def test_scores_and_documents_are_mapped_not_read(folder: Path) -> None:
    loaded = load_index(folder)
    for name in ("data", "indices", "indptr"):
        base = loaded.ranker.scorer.scores[name]
        while isinstance(base, np.ndarray) and base.base is not None:
            base = base.base
        assert isinstance(base, mmap.mmap)
    assert isinstance(loaded.documents.bytes, mmap.mmap)


def test_nothing_in_the_folder_is_a_pickle(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir())
    assert all(name.endswith((".json", ".jsonl", ".npy")) for name in names)
    for path in folder.glob("*.npy"):
        assert not zipfile.is_zipfile(path)
        assert not np.load(path, allow_pickle=False).dtype.hasobject


def test_a_pickle_in_the_folder_is_not_loaded(folder: Path) -> None:
    victim = folder / "data.csc.index.npy"
    np.save(victim, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    facts = {"bytes": victim.stat().st_size, "crc32": crc32_file(victim)}
    edit_manifest(folder, lambda m: m["files"][victim.name].update(facts))
    with pytest.raises(IndexFolderError, match="damaged"):
        load_index(folder)


def test_the_same_corpus_gives_the_same_files(
    documents: list[Document], folder: Path, tmp_path: Path
) -> None:
    again = save_index(BM25Retriever.build(documents), tmp_path / "again")
    for path in folder.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes()


def test_another_corpus_is_refused(folder: Path, documents: list[Document]) -> None:
    assert load_index(folder, documents_digest(documents)).search(["engine"], 1)[0]
    with pytest.raises(IndexFolderError, match="built from another corpus"):
        load_index(folder, documents_digest(documents[:-1]))


def test_options_are_kept(documents: list[Document], tmp_path: Path) -> None:
    built = BM25Retriever.build(documents, BM25Options(k1=0.4, b=0.1))
    loaded = load_index(save_index(built, tmp_path / "index"))
    assert loaded.ranker.options == BM25Options(k1=0.4, b=0.1)
    assert loaded.search(QUERIES, 3) == built.search(QUERIES, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format=99), "expected an index of format 1"),
        (lambda m: m.update(kind="sparse"), "expected one of bm25, bm25-disk, bm25-fast, dense, hybrid"),
        (lambda m: m.update(documents=4), "disagree on the number of documents"),
        (lambda m: m.pop("corpus_digest"), "field 'corpus_digest'"),
        (lambda m: m["options"].update(words="other"), "words were split by 'other'"),
        (lambda m: m["options"].update(k1=-1), "damaged"),
        (lambda m: m["options"].update(k2=1), "damaged"),
        (lambda m: m["files"].update({"vocab.index.json": 3}), "missing or cut off"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(folder: Path, change, message: str) -> None:
    edit_manifest(folder, change)
    with pytest.raises(IndexFolderError, match=message):
        load_index(folder)


def test_a_missing_extra_is_no_damage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.delitem(sys.modules, "rexrag.retrieval.rankers.dense", raising=False)
    edit_manifest(folder, lambda m: m.update(kind="dense"))
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[dense\]'"):
        load_index(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "\ufffe"])
def test_a_damaged_manifest_is_refused(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text)
    with pytest.raises(IndexFolderError):
        load_index(folder)


def test_every_file_is_missed_when_gone_or_cut_off(folder: Path, tmp_path: Path) -> None:
    for name in [path.name for path in folder.iterdir()]:
        for damage in (lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:-2])):
            copy = tmp_path / "copy"
            shutil.copytree(folder, copy)
            damage(copy / name)
            with pytest.raises(IndexFolderError):
                load_index(copy)
            shutil.rmtree(copy)


def test_a_changed_byte_of_a_large_file_is_found_by_the_check(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "documents.jsonl"
    path.write_bytes(path.read_bytes().replace(b"Thames", b"Tharne"))
    with monkeypatch.context() as patch:
        patch.setattr("rexrag.retrieval.index.folder.CHECKED_AT_OPEN", path.stat().st_size - 1)
        load_index(folder)
    for find in (load_index, check_index, lambda folder: load_index(folder, verify=True)):
        with pytest.raises(IndexFolderError, match=r"documents\.jsonl: its bytes have changed"):
            find(folder)


def test_a_folder_of_an_earlier_version_is_opened_and_checked(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["sha256"]
    for facts in manifest["files"].values():
        del facts["crc32"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert load_index(folder).search(["Thames"], 1)[0][0].id == "d2"
    path = folder / "documents.jsonl"
    path.write_bytes(path.read_bytes().replace(b"Thames", b"Tharne"))
    with pytest.raises(IndexFolderError, match="its bytes have changed"):
        load_index(folder)


def test_saving_replaces_an_index_but_nothing_else(
    retriever: BM25Retriever, folder: Path, documents: list[Document], tmp_path: Path
) -> None:
    save_index(BM25Retriever.build(documents[:2]), folder)
    assert len(load_index(folder).documents) == 2
    # An open index may be saved over itself: its files are mapped from the old folder.
    save_index(load_index(folder), folder)
    assert len(load_index(folder, verify=True).documents) == 2

    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.txt").write_text("years of work")
    with pytest.raises(IndexFolderError, match="not an index folder"):
        save_index(retriever, other)
    with pytest.raises(IndexFolderError, match="not an index folder"):
        save_index(retriever, other / "chapter.txt")
    assert (other / "chapter.txt").read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "thesis"]


def test_no_index_here(tmp_path: Path) -> None:
    with pytest.raises(IndexFolderError, match="no index here"):
        load_index(tmp_path)
    with pytest.raises(IndexFolderError, match="no index here"):
        load_index(tmp_path / "absent")
