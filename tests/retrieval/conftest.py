"""Small corpora: five passages, and a world's."""

from pathlib import Path

import pytest

from rexrag.data.world.generator import World
from rexrag.io import write_jsonl
from rexrag.retrieval.rankers.bm25 import BM25Retriever
from rexrag.types import Document

TEXTS = [
    ("Ada Lovelace", "Ada Lovelace wrote the first program for the Analytical Engine."),
    ("Charles Babbage", "Charles Babbage designed the Analytical Engine in London."),
    ("London", "London is the capital of England, on the river Thames."),
    ("Mapy Cortés", "Mapy Cortés was an actress; she was born in San Juan."),
    ("Mary's Chapel", "A chapel in Edinburgh, Mary's own."),
]


@pytest.fixture
def documents() -> list[Document]:
    return [Document(f"d{i}", f'"{title}"\n{text}') for i, (title, text) in enumerate(TEXTS)]


@pytest.fixture
def retriever(documents: list[Document]) -> BM25Retriever:
    return BM25Retriever.build(documents)


@pytest.fixture(scope="session")
def world() -> World:
    return World(seed=3, people=400)


@pytest.fixture
def corpus(world: World, tmp_path: Path) -> Path:
    """The world's passages in a file, numbered as it numbers them."""
    path = tmp_path / "corpus.jsonl"
    write_jsonl(path, ({"id": d.id, "contents": d.contents} for d in world.documents))
    return path
