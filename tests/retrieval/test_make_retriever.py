import os
import subprocess
import sys
from pathlib import Path

import pytest

from rexrag.config.schema import RetrieverConfig
from rexrag.errors import ConfigError, DataError, IndexFolderError
from rexrag.io import write_jsonl
from rexrag.retrieval import make_retriever
from rexrag.retrieval.http.client import RemoteRetriever
from rexrag.retrieval.index.folder import save_index
from rexrag.retrieval.rankers.bm25 import BM25Retriever
from rexrag.types import Document


@pytest.fixture
def corpus(documents: list[Document], tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "corpus.jsonl", ({"id": d.id, "contents": d.contents} for d in documents))
    return tmp_path / "corpus.jsonl"


def test_documents_a_file_and_a_saved_index_are_one_retriever(
    documents: list[Document], corpus: Path, retriever: BM25Retriever, tmp_path: Path
) -> None:
    index = RetrieverConfig(index=str(save_index(retriever, tmp_path / "index")))
    made = [
        make_retriever(RetrieverConfig(), documents),
        make_retriever(RetrieverConfig(), iter(documents)),
        make_retriever(RetrieverConfig(), corpus),
        make_retriever(RetrieverConfig(), str(corpus)),
        make_retriever(index),
        make_retriever(index, ""),
        make_retriever(index, corpus),
        make_retriever(index, documents),
    ]
    assert {one.digest for one in made} == {retriever.digest}
    for one in made:
        assert one.search(["London", "the"], 2) == retriever.search(["London", "the"], 2)


def test_an_index_of_another_corpus_is_refused(
    documents: list[Document], retriever: BM25Retriever, tmp_path: Path
) -> None:
    index = RetrieverConfig(index=str(save_index(retriever, tmp_path / "index")))
    with pytest.raises(IndexFolderError, match="another corpus"):
        make_retriever(index, documents[1:])


def test_remote() -> None:
    remote = make_retriever(RetrieverConfig(kind="remote", url="http://127.0.0.1:9", retries=2))
    assert isinstance(remote, RemoteRetriever)
    assert (str(remote.url), remote.retries) == ("http://127.0.0.1:9/retrieve", 2)
    remote.close()


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"retriever\.url is empty"):
        make_retriever(RetrieverConfig(kind="remote"))
    for nothing in (None, ""):
        with pytest.raises(ConfigError, match=r"retriever\.index and data\.corpus are both empty"):
            make_retriever(RetrieverConfig(), nothing)
    with pytest.raises(DataError, match="no such file"):
        make_retriever(RetrieverConfig(), tmp_path / "absent.jsonl")


def test_the_package_alone_loads_no_server_and_no_index() -> None:
    code = "import sys, rexrag.retrieval; print({'bm25s', 'fastapi', 'httpx'} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.stdout, done.stderr) == ("set()\n", "")
