"""A build streams, resumes, refuses what does not fit; every lexical kind finds what BM25 in memory finds."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rexrag.config.schema import RetrieverConfig
from rexrag.data.world.generator import World
from rexrag.errors import ConfigError, DataError, IndexFolderError
from rexrag.io import write_jsonl
from rexrag.retrieval import make_retriever
from rexrag.retrieval.corpus import documents_digest, read_corpus
from rexrag.retrieval.index import build
from rexrag.retrieval.index.build import STATE, BuildOptions, build_index
from rexrag.retrieval.index.documents import StoredDocuments, write_documents
from rexrag.retrieval.index.estimate import estimate
from rexrag.retrieval.index.folder import load_index
from rexrag.retrieval.rankers import tantivy as disk
from rexrag.retrieval.rankers.bm25 import BM25Options, BM25Retriever
from rexrag.types import Document

DISK = BuildOptions(kind="bm25-disk")


def test_bm25_built_from_a_file_is_the_one_saved_from_memory(
    corpus: Path, world: World, tmp_path: Path
) -> None:
    facts = build_index(corpus, tmp_path / "index", BuildOptions())
    loaded, memory = load_index(tmp_path / "index", verify=True), BM25Retriever.build(world.documents)
    assert facts["documents"] == len(world.documents)
    assert loaded.digest == memory.digest
    queries = [question.text for question in world.questions("train", 30)]
    assert loaded.search(queries, 5) == memory.search(queries, 5)


def test_bm25_disk_finds_what_bm25_finds(corpus: Path, world: World, tmp_path: Path) -> None:
    build_index(corpus, tmp_path / "index", DISK)
    found = make_retriever(RetrieverConfig(kind="bm25-disk", index=str(tmp_path / "index")), corpus)
    memory = BM25Retriever.build(world.documents)
    queries = [question.text for question in world.questions("train", 100)]
    overlap = 0
    for ours, exact in zip(
        found.search(queries, 3), memory.search(queries, len(world.documents)), strict=True
    ):
        scores = {document.id: document.score for document in exact}
        third = exact[2].score
        # Ties are equally right; lengths rounded to a byte move a score by a few hundredths.
        overlap += sum(scores[document.id] >= third - 0.05 for document in ours)
        assert [document.score for document in ours] == sorted((d.score for d in ours), reverse=True)
    assert overlap / 300 > 0.97
    assert found.search(["", "the", "zyxwv", "Mapy's"], 3) == [[], [], [], []]
    assert len(found.search([world.documents[0].contents], 10**6)[0]) <= len(world.documents)


def test_words_that_a_query_language_would_read_are_only_words(tmp_path: Path) -> None:
    write_jsonl(
        tmp_path / "c.jsonl",
        [
            {"id": "a", "contents": 'or AND not: (title:x) "quoted" Mapy Cortés'},
            {"id": "b", "contents": "y" * 70_000 + " long"},
        ],
    )
    build_index(tmp_path / "c.jsonl", tmp_path / "index", DISK)
    found = load_index(tmp_path / "index")
    for query in ('title:"quoted', "mapy cortes", "(x OR", "* quoted +", "^~quoted"):
        assert [d.id for d in found.search([query], 2)[0]] == ["a"], query
    assert [d.id for d in found.search(["long"], 2)[0]] == ["b"]


def test_repeated_words_count_as_often_as_they_are_asked(corpus: Path, world: World, tmp_path: Path) -> None:
    build_index(corpus, tmp_path / "index", DISK)
    name = world.names["person"][0]
    once, twice = load_index(tmp_path / "index").search([name, f"{name} {name}"], 1)
    assert twice[0].score == pytest.approx(2 * once[0].score, rel=1e-5)


@pytest.mark.parametrize("where", ["write_manifest", "replace_folder"])
def test_a_build_stopped_at_its_very_end_goes_on(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build, where, stop)
        with pytest.raises(KeyboardInterrupt):
            build_index(corpus, tmp_path / "index", DISK)
    calls: list[str] = []
    build_index(corpus, tmp_path / "index", DISK, lambda stage, done, total: calls.append(stage))
    assert set(calls) == {"checking"}, "nothing is built again"
    assert not (tmp_path / "index" / STATE).exists() and not (tmp_path / "index.partial").exists()
    assert load_index(tmp_path / "index").search(["mayor"], 1)[0]


def test_restart_leaves_a_running_build_alone(corpus: Path, tmp_path: Path) -> None:
    def tell(stage: str, done: int, total: int) -> None:
        if stage == "words" and not seen:
            seen.append(stage)
            with pytest.raises(IndexFolderError, match="another build is writing here"):
                build_index(corpus, tmp_path / "index", DISK, restart=True)

    seen: list[str] = []
    build_index(corpus, tmp_path / "index", DISK, tell)
    assert seen


def test_a_killed_build_goes_on(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed for real inside the words stage, after a commit; the second call does not begin again."""
    out = tmp_path / "index"
    code = (
        "import os, sys\n"
        "from rexrag.retrieval.rankers import tantivy as disk\n"
        "from rexrag.retrieval.index.build import BuildOptions, build_index\n"
        "disk.COMMIT_EVERY = 100\n"
        "def tell(stage, done, total):\n"
        "    if stage == 'words' and done == 250: os.kill(os.getpid(), 9)\n"
        "build_index(sys.argv[1], sys.argv[2], BuildOptions(kind='bm25-disk'), tell)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", code, str(corpus), str(out)], env=environment)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    assert (tmp_path / "index.partial" / STATE).is_file()

    with pytest.raises(IndexFolderError, match="unfinished build with another kind"):
        build_index(corpus, out, BuildOptions(kind="bm25"))

    calls: list[tuple[str, int]] = []
    build_index(corpus, out, DISK, lambda stage, done, total: calls.append((stage, done)))
    assert "documents" not in {stage for stage, _ in calls}
    assert next(done for stage, done in calls if stage == "words") == 201
    build_index(corpus, tmp_path / "whole", DISK)
    queries = ["Who is married to Anna?", "capital", "Berg Lund"]
    assert load_index(out, verify=True).search(queries, 5) == load_index(tmp_path / "whole").search(
        queries, 5
    )
    assert not list(tmp_path.glob("*.partial"))
    assert not list(tmp_path.glob(".*lock"))


def test_a_corpus_that_changed_under_an_unfinished_build(corpus: Path, tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if stage == "words":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_index(corpus, tmp_path / "index", DISK, stop)
    time.sleep(0.01)
    corpus.write_text(corpus.read_text() + json.dumps({"id": "new", "contents": "new"}) + "\n")
    with pytest.raises(IndexFolderError, match=r"another corpus.*--restart"):
        build_index(corpus, tmp_path / "index", DISK)
    facts = build_index(corpus, tmp_path / "index", DISK, restart=True)
    assert facts["corpus_digest"] == documents_digest(read_corpus(corpus))


@pytest.mark.parametrize("kind", ["bm25", "bm25-disk"])
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("", "c.jsonl: the corpus is empty"),
        (
            '{"id": 1, "contents": "x"}\n{"id": "1", "contents": "y"}\n',
            "c.jsonl, row 2, field 'id': '1' was seen",
        ),
        ('{"id": 1, "contents": "x"}\n{"id": 2}\n', "c.jsonl, row 2, field 'contents': missing; expected"),
        ('{"id": 1, "contents": "the"}\n', "nothing to index: 1 documents"),
    ],
)
def test_a_bad_corpus_leaves_nothing_behind(kind: str, rows: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text(rows)
    with pytest.raises(DataError) as caught:
        build_index(tmp_path / "c.jsonl", tmp_path / "index", BuildOptions(kind=kind))
    assert message in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]


def test_a_folder_of_something_else_is_left_alone(corpus: Path, tmp_path: Path) -> None:
    for name in ("thesis", "thesis.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "chapter.txt").write_text("years of work")
        with pytest.raises(IndexFolderError, match="left as it is"):
            build_index(corpus, tmp_path / "thesis", DISK, restart=True)
        assert (tmp_path / name / "chapter.txt").read_text() == "years of work"
        if name == "thesis":
            (tmp_path / name / "chapter.txt").unlink()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "bm26"}, "expected one of bm25, bm25-disk, bm25-fast, dense, hybrid"),
        ({"kind": "dense"}, "--kind dense needs --encoder"),
        ({"kind": "hybrid"}, "--kind hybrid needs --encoder"),
        (
            {"kind": "hybrid", "encoder": "x", "lexical": "dense"},
            "expected one of bm25, bm25-disk, bm25-fast",
        ),
        ({"kind": "bm25-disk", "bm25": BM25Options(k1=0.9)}, "k1 = 1.2 and b = 0.75 only"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BuildOptions(**options)  # type: ignore[arg-type]


def test_a_kind_other_than_the_index(corpus: Path, tmp_path: Path) -> None:
    build_index(corpus, tmp_path / "index", DISK)
    with pytest.raises(ConfigError, match=r"is a 'bm25-disk' index; set retriever\.kind = 'bm25-disk'"):
        make_retriever(RetrieverConfig(index=str(tmp_path / "index")))
    with pytest.raises(ConfigError, match="rexrag index build CORPUS --out DIR --kind hybrid"):
        make_retriever(RetrieverConfig(kind="hybrid"), corpus)


def test_a_damaged_tantivy_folder(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_index(corpus, tmp_path / "index", DISK)
    meta = tmp_path / "index" / disk.FOLDER / "meta.json"
    meta.write_text("x" * meta.stat().st_size)
    with pytest.raises(IndexFolderError, match="its bytes have changed"):
        load_index(tmp_path / "index")
    with monkeypatch.context() as patch, pytest.raises(IndexFolderError, match="damaged"):
        patch.setattr("rexrag.retrieval.index.folder.CHECKED_AT_OPEN", 0)
        load_index(tmp_path / "index")
    with pytest.raises(IndexFolderError, match="its bytes have changed"):
        load_index(tmp_path / "index", verify=True)


def test_ids_whose_hashes_collide_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Same:
        def __init__(self, data: bytes, digest_size: int) -> None: ...

        def digest(self) -> bytes:
            return b"\0" * 8

    monkeypatch.setattr("rexrag.retrieval.index.documents.blake2b", Same)
    write_documents(tmp_path, [Document("a", "x"), Document("b", "y")])
    assert StoredDocuments(tmp_path)[1] == Document("b", "y")
    with pytest.raises(DataError, match=r"row 3, field 'id': 'a' was seen before \(document 1\)"):
        write_documents(tmp_path, [Document("a", "x"), Document("b", "y"), Document("a", "z")])


@pytest.mark.parametrize("kind", ["bm25", "bm25-disk"])
def test_the_estimate_comes_near_what_is_built(kind: str, corpus: Path, world: World, tmp_path: Path) -> None:
    needs = estimate(corpus, tmp_path / "index", BuildOptions(kind=kind))
    facts = build_index(corpus, tmp_path / "index", BuildOptions(kind=kind))
    assert needs.documents == len(world.documents)
    assert 0.5 < needs.disk / facts["bytes"] < 2


def test_a_build_that_does_not_fit_the_disk(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rexrag.retrieval.index.estimate._free", lambda out: 1000.0)
    with pytest.raises(
        ConfigError, match=r"index: about [\d.]+ (kB|MB) of disk are needed for the index, 1 kB are free"
    ):
        estimate(corpus, tmp_path / "index", DISK)
    with pytest.raises(DataError, match="no such file"):
        estimate(tmp_path / "absent.jsonl", tmp_path / "index", DISK)
