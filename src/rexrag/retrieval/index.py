"""A BM25 index as a folder that opens at once however large it is: scores and passages are memory-mapped.

| file | what |
|---|---|
| `manifest.json` | what it was built from, options, versions, size and SHA-256 of each file |
| `*.csc.index.npy` | the scores, as bm25s writes them: arrays without pickle |
| `vocab.index.json`, `params.index.json` | words by number and bm25s's own parameters |
| `documents.jsonl` | `id, contents`, in corpus order |
| `documents.offsets.npy` | int64 [N + 1]: where each line begins, then the end |

Only folders of this format are opened, and nothing in them is code.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
from numpy.typing import NDArray

from rexrag.errors import IndexFolderError
from rexrag.io import atomic_folder, json_line, sha256_file, write_json
from rexrag.retrieval.bm25 import BM25Options, BM25Retriever
from rexrag.types import Document

FORMAT = 1
MANIFEST = "manifest.json"
DOCUMENTS = "documents.jsonl"
OFFSETS = "documents.offsets.npy"


class StoredDocuments:
    """Documents of an index folder; each is read from the mapped file when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.offsets: NDArray[np.int64] = np.load(folder / OFFSETS, mmap_mode="r", allow_pickle=False)
        with (folder / DOCUMENTS).open("rb") as file:
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, place: int, /) -> Document:
        if not 0 <= place < len(self):
            raise IndexError(f"document {place} of {len(self)}")
        row = json.loads(self.bytes[self.offsets[place] : self.offsets[place + 1]])
        return Document(row["id"], row["contents"])


def save_index(retriever: BM25Retriever, folder: str | Path) -> Path:
    """Write an index folder, whole or not at all. An index that stood there is replaced.

    Raises IndexFolderError where something else stands there.
    """
    folder = Path(folder)
    if folder.exists() and not _replaceable(folder):
        raise IndexFolderError(f"{folder}: exists and is not an index folder; it is left as it is")
    with atomic_folder(folder) as temporary:
        retriever.scorer.save(temporary, allow_pickle=False, show_progress=False)
        _write_documents(retriever, temporary)
        manifest = {
            "format": FORMAT,
            "kind": "bm25",
            "documents": len(retriever.documents),
            "corpus_digest": retriever.corpus_digest,
            "options": asdict(retriever.options),
            "bm25s": version("bm25s"),
            "files": {
                file.name: {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
                for file in sorted(temporary.iterdir())
            },
        }
        write_json(temporary / MANIFEST, manifest)
    return folder


def load_index(
    folder: str | Path, corpus_digest: str | None = None, *, verify: bool = False
) -> BM25Retriever:
    """Open an index folder, memory-mapped. `verify` also reads every file and checks its SHA-256.

    Raises IndexFolderError where the folder is missing, damaged, of another format, or was built from a
    corpus other than the one with `corpus_digest` (see `corpus.documents_digest`).
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    built_from = manifest["corpus_digest"]
    if corpus_digest is not None and corpus_digest != built_from:
        raise IndexFolderError(
            f"{folder}: built from another corpus (its digest is {built_from[:12]}…, the given corpus has "
            f"{corpus_digest[:12]}…); build the index again"
        )
    _check_files(folder, manifest["files"], verify)
    try:
        options = BM25Options(**manifest["options"])
        scorer = bm25s.BM25.load(
            folder, mmap=True, allow_pickle=False, load_corpus=False, override_params={"backend": "numpy"}
        )
        # Plain views of the mapped arrays: slicing numpy's memmap class costs more than the search.
        for name in ("data", "indices", "indptr"):
            scorer.scores[name] = scorer.scores[name].view(np.ndarray)
        documents = StoredDocuments(folder)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise IndexFolderError(f"{folder}: damaged: {error}") from None
    if options.words != BM25Options().words:
        raise IndexFolderError(f"{folder}: words were split by '{options.words}'; build the index again")
    arrays = scorer.scores
    if not len(documents) == arrays["num_docs"] == manifest["documents"]:
        raise IndexFolderError(f"{folder}: damaged: its files disagree on the number of documents")
    if len(arrays["indptr"]) != len(scorer.vocab_dict) + 1 or arrays["indptr"][-1] != len(arrays["data"]):
        raise IndexFolderError(f"{folder}: damaged: its vocabulary and scores disagree")
    return BM25Retriever(scorer, documents, options, built_from)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of an index folder of this format. Raises IndexFolderError."""
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise IndexFolderError(f"{folder}: no index here (no {MANIFEST})") from None
    except (OSError, ValueError) as error:
        raise IndexFolderError(f"{path}: damaged: {error}") from None
    if not isinstance(manifest, dict) or (manifest.get("format"), manifest.get("kind")) != (FORMAT, "bm25"):
        raise IndexFolderError(f"{path}: expected a BM25 index of format {FORMAT}; build the index again")
    shape: dict[str, type] = {"documents": int, "corpus_digest": str, "options": dict, "files": dict}
    for key, kind in shape.items():
        if not isinstance(manifest.get(key), kind):
            raise IndexFolderError(f"{path}: damaged: field '{key}' is missing or of another type")
    return manifest


def _replaceable(folder: Path) -> bool:
    return folder.is_dir() and ((folder / MANIFEST).is_file() or not any(folder.iterdir()))


def _write_documents(retriever: BM25Retriever, folder: Path) -> None:
    offsets = np.zeros(len(retriever.documents) + 1, dtype=np.int64)
    with (folder / DOCUMENTS).open("wb") as file:
        for place in range(len(retriever.documents)):
            document = retriever.documents[place]
            offsets[place + 1] = offsets[place] + file.write(
                json_line({"id": document.id, "contents": document.contents})
            )
    np.save(folder / OFFSETS, offsets, allow_pickle=False)


def _check_files(folder: Path, files: Mapping[str, Any], verify: bool) -> None:
    """Sizes always, since a cut-off copy is the usual damage; digests where asked."""
    for name, expected in files.items():
        path = folder / name
        known = expected if isinstance(expected, Mapping) else {}
        if not path.is_file() or path.stat().st_size != known.get("bytes"):
            raise IndexFolderError(f"{path}: missing or cut off; build the index again")
        if verify and sha256_file(path) != known.get("sha256"):
            raise IndexFolderError(f"{path}: its bytes have changed; build the index again")
