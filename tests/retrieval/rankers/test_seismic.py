"""bm25-fast scores as BM25 does; what it leaves out is little where words are as rare as in real text."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rexrag.config.schema import RetrieverConfig
from rexrag.data.world.generator import World
from rexrag.errors import ConfigError, DataError, IndexFolderError
from rexrag.io import write_jsonl
from rexrag.retrieval import make_retriever
from rexrag.retrieval.index.build import BuildOptions, build_index
from rexrag.retrieval.index.estimate import estimate
from rexrag.retrieval.index.folder import load_index
from rexrag.retrieval.rankers.bm25 import BM25Options, BM25Retriever
from rexrag.types import Document
from tests.support.indexes import edit_manifest

pytest.importorskip("seismic", reason="needs the extra: pip install -e '.[fast]'")

from rexrag.retrieval.rankers import seismic as fast

FAST = BuildOptions(kind="bm25-fast")


def write(path: Path, rows: list[tuple[str, str]]) -> Path:
    write_jsonl(path, ({"id": number, "contents": text} for number, text in rows))
    return path


def zipf_texts(documents: int, vocabulary: int, seed: int = 0) -> list[str]:
    """Passages of 40 words whose frequencies fall as those of a language do."""
    words = np.random.default_rng(seed).zipf(1.3, (documents, 40)) % vocabulary
    return [" ".join(f"w{word}" for word in row) for row in words]


@pytest.mark.parametrize("bm25", [BM25Options(), BM25Options(k1=0.9, b=0.4)])
def test_scores_are_bm25_s(bm25: BM25Options, corpus: Path, world: World, tmp_path: Path) -> None:
    build_index(corpus, tmp_path / "index", BuildOptions(kind="bm25-fast", bm25=bm25))
    found = make_retriever(RetrieverConfig(kind="bm25-fast", index=str(tmp_path / "index")), corpus)
    memory = BM25Retriever.build(world.documents, bm25)
    queries = [question.text for question in world.questions("train", 50)]
    exact = memory.search(queries, len(world.documents))
    shares = []
    for ours, theirs in zip(found.search(queries, 5), exact, strict=True):
        scores = {document.id: document.score for document in theirs}
        assert [d.score for d in ours] == pytest.approx([scores[d.id] for d in ours], rel=2e-3)  # float16
        border = theirs[4].score * (1 - 2e-3)
        shares.append(sum(scores[document.id] >= border for document in ours) / 5)
    assert np.mean(shares) > 0.9


@pytest.mark.parametrize("small_vocabulary", [1 << 16, 100])  # the second: Seismic's layout of large ones
def test_little_is_missed_where_most_words_are_rare(
    small_vocabulary: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast, "SMALL_VOCABULARY", small_vocabulary)
    texts = zipf_texts(4000, 100_000)
    corpus = write(tmp_path / "c.jsonl", [(str(place), text) for place, text in enumerate(texts)])
    build_index(corpus, tmp_path / "index", FAST)
    found = load_index(tmp_path / "index")
    memory = BM25Retriever.build(Document(str(place), text) for place, text in enumerate(texts))
    queries = [" ".join(text.split()[:8]) for text in texts[:200]]
    pairs = zip(found.search(queries, 3), memory.search(queries, 3), strict=True)
    kept = [len({d.id for d in ours} & {d.id for d in exact}) / 3 for ours, exact in pairs]
    assert np.mean(kept) > 0.9


def build_by_command(corpus: Path, out: Path, *more: str) -> tuple[str, str]:
    command = [sys.executable, "-m", "rexrag", "index", "build", str(corpus)]
    command += ["--out", str(out), "--kind", "bm25-fast", *more]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout, done.stderr


def test_a_build_says_what_it_misses(tmp_path: Path) -> None:
    common = np.random.default_rng(0).integers(0, 12, (8000, 6))  # each word is in a third of the passages
    rows = [(str(place), " ".join(f"w{word}" for word in row)) for place, row in enumerate(common)]
    corpus = write(tmp_path / "common.jsonl", rows)
    out, said = build_by_command(corpus, tmp_path / "a", "--json")
    assert json.loads(out)["recall"] < 0.9
    assert "warning: bm25-fast misses more than a tenth" in said
    rows = [(str(place), text) for place, text in enumerate(zipf_texts(4000, 100_000))]
    corpus = write(tmp_path / "rare.jsonl", rows)
    out, said = build_by_command(corpus, tmp_path / "b")
    assert "of the ten best passages (64 sampled queries)" in out
    assert "misses" not in said


def test_the_recall_of_a_build_is_that_of_its_searches(corpus: Path, world: World, tmp_path: Path) -> None:
    """Counted again with another index of the same corpus, and queries of whole questions."""
    facts = build_index(corpus, tmp_path / "index", FAST)
    found, memory = load_index(tmp_path / "index"), BM25Retriever.build(world.documents)
    queries = [question.text for question in world.questions("train", 100)]
    shares = []
    for ours, exact in zip(found.search(queries, 10), memory.search(queries, 10), strict=True):
        border = exact[-1].score * (1 - 2e-3)
        shares.append(sum(document.score >= border for document in ours) / len(exact))
    assert facts["recall"] == pytest.approx(np.mean(shares), abs=0.12)


def test_a_large_vocabulary_has_its_own_layout() -> None:
    small, large = fast._classes(fast.SMALL_VOCABULARY), fast._classes(fast.SMALL_VOCABULARY + 1)
    assert small != large


def test_equal_passages_come_by_place_and_strange_queries_find_nothing(tmp_path: Path) -> None:
    rows = [
        (f"d{place}", "the" if place == 3 else "red apple" if place % 2 else "green pear")
        for place in range(12)
    ]
    build_index(write(tmp_path / "c.jsonl", rows), tmp_path / "index", FAST)
    index = load_index(tmp_path / "index")
    found = index.search(["apple", "zebra", "", "the", "Pear pear"], 3)
    assert [[document.id for document in documents] for documents in found] == [
        ["d1", "d5", "d7"], [], [], [], ["d0", "d2", "d4"]
    ]  # fmt: skip
    assert index.search([], 3) == []


def test_building_says_nothing_on_stdout(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    build_index(corpus, tmp_path / "index", FAST)
    print("heard again")
    assert capfd.readouterr().out == "heard again\n"


def test_a_corpus_without_words_leaves_nothing_behind(tmp_path: Path) -> None:
    write(tmp_path / "c.jsonl", [("1", "the")])
    with pytest.raises(DataError, match="nothing to index: 1 documents"):
        build_index(tmp_path / "c.jsonl", tmp_path / "index", FAST)
    assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]


@pytest.mark.parametrize("name", ["fast.index.seismic", "fast.words.json", "fast.weights.npy"])
def test_damage_is_one_line(name: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_index(corpus, tmp_path / "index", FAST)
    file = tmp_path / "index" / name
    file.write_bytes(b"\xff" * file.stat().st_size)
    with monkeypatch.context() as patch, pytest.raises(IndexFolderError, match="damaged"):
        patch.setattr("rexrag.retrieval.index.folder.CHECKED_AT_OPEN", 0)
        load_index(tmp_path / "index")
    with pytest.raises(IndexFolderError, match="its bytes have changed"):
        load_index(tmp_path / "index", verify=True)


def test_words_split_otherwise(corpus: Path, tmp_path: Path) -> None:
    build_index(corpus, tmp_path / "index", FAST)
    edit_manifest(tmp_path / "index", lambda m: m["options"]["bm25"].update(words="stemmed"))
    with pytest.raises(IndexFolderError, match="words were split by 'stemmed'"):
        load_index(tmp_path / "index")


def test_a_missing_extra_is_no_damage(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_index(corpus, tmp_path / "index", FAST)
    monkeypatch.setitem(sys.modules, "seismic", None)
    monkeypatch.delitem(sys.modules, "rexrag.retrieval.rankers.seismic")
    monkeypatch.delattr("rexrag.retrieval.rankers.seismic")
    with pytest.raises(ConfigError, match=r"bm25-fast needs an extra: pip install -e '\.\[fast\]'"):
        load_index(tmp_path / "index")
    with pytest.raises(ConfigError, match="bm25-fast needs an extra"):
        estimate(corpus, tmp_path / "other", FAST)


def test_the_estimate_comes_near_what_is_built(corpus: Path, world: World, tmp_path: Path) -> None:
    needs = estimate(corpus, tmp_path / "index", FAST)
    facts = build_index(corpus, tmp_path / "index", FAST)
    assert needs.documents == len(world.documents)
    assert 0.5 < needs.disk / facts["bytes"] < 2
