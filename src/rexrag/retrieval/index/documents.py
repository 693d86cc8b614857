"""The passages of an index folder: written as they stream by, memory-mapped when they are read.

| file | what |
|---|---|
| `documents.jsonl` | `id, contents`, in corpus order |
| `documents.offsets.npy` | int64 [N + 1]: where each line begins, then the end |
"""

from __future__ import annotations

import json
import mmap
from array import array
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rexrag.errors import DataError
from rexrag.io import json_line
from rexrag.retrieval.corpus import documents_digest
from rexrag.types import Document

DOCUMENTS = "documents.jsonl"
OFFSETS = "documents.offsets.npy"


class StoredDocuments:
    """Documents of an index folder; each is read from the mapped file when it is asked for."""

    def __init__(self, folder: Path) -> None:
        offsets = np.load(folder / OFFSETS, mmap_mode="r", allow_pickle=False)
        # A plain view: numpy's memmap class costs more than reading the document does.
        self.offsets: NDArray[np.int64] = offsets.view(np.ndarray)
        with (folder / DOCUMENTS).open("rb") as file:
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, place: int, /) -> Document:
        if not 0 <= place < len(self):
            raise IndexError(f"document {place} of {len(self)}")
        start, end = self.offsets[place : place + 2].tolist()
        row = json.loads(self.bytes[start:end])
        return Document(row["id"], row["contents"])

    def texts(self, start: int = 0) -> Iterator[str]:
        """Contents from a place on, in order."""
        return (self[place].contents for place in range(start, len(self)))


def write_documents(
    folder: Path,
    documents: Iterable[Document],
    counted: Callable[[int], None] | None = None,
    file: object = None,
) -> str:
    """Write a stream of documents and return the digest of the corpus; nothing of it is kept in memory.

    16 bytes a document stay: where it begins, and a hash of its id to find one that comes twice.
    Raises DataError, naming `file`, for an id that comes twice (with its row among the documents) and for
    no documents.
    """
    offsets, hashes = array("q", [0]), array("Q")

    def written() -> Iterator[Document]:
        with (folder / DOCUMENTS).open("wb") as file:
            for document in documents:
                line = json_line({"id": document.id, "contents": document.contents})
                offsets.append(offsets[-1] + file.write(line))
                hashes.append(int.from_bytes(blake2b(document.id.encode(), digest_size=8).digest()))
                if counted is not None:
                    counted(len(hashes))
                yield document

    digest = documents_digest(written())
    if not hashes:
        raise DataError("the corpus is empty; expected one JSON object a line", file=file)
    np.save(folder / OFFSETS, np.frombuffer(offsets, dtype=np.int64), allow_pickle=False)
    _refuse_duplicates(np.frombuffer(hashes, dtype=np.uint64), StoredDocuments(folder), file)
    return digest


def _refuse_duplicates(hashes: NDArray[np.uint64], documents: StoredDocuments, file: object) -> None:
    order = np.argsort(hashes, kind="stable")
    suspects = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    seen: dict[str, int] = {}
    # Equal hashes are not yet equal ids.
    for place in sorted({int(order[i + side]) for i in suspects for side in (0, 1)}):
        name = documents[place].id
        if name in seen:
            raise DataError(
                f"'{name}' was seen before (document {seen[name] + 1}); ids are unique",
                file=file,
                row=place + 1,
                field="id",
            )
        seen[name] = place
