"""An index folder: opens fast however large it is, because nearly all of it is memory-mapped.

| file | kinds | what |
|---|---|---|
| `manifest.json` | all | corpus, options, encoder, versions; size and checksums of each file and of itself |
| `documents.*` | all | the passages (`documents.py`) |
| `*.csc.index.npy`, `vocab.index.json`, `params.index.json` | bm25 | as bm25s writes them, without pickle |
| `tantivy/` | bm25-disk | as tantivy writes it |
| `fast.*` | bm25-fast | as Seismic writes it, words and their weights; read, not mapped |
| `vectors.npy`, `ann.faiss` | dense | unit vectors; a faiss index where the search is approximate |

A `hybrid` folder holds the files of both its parts. Only folders of this format are opened, and nothing in
them is code.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from rexrag.errors import IndexFolderError, ModelError
from rexrag.io import atomic_folder, sha256_file, sha256_rows, write_json
from rexrag.retrieval.base import CorpusRetriever, Ranker
from rexrag.retrieval.index.documents import StoredDocuments, write_documents
from rexrag.retrieval.rankers.bm25 import SPACED, UNSPACED, BM25Options, BM25Ranker, BM25Retriever
from rexrag.retrieval.rankers.bm25s_alone import bm25s

FORMAT = 1
MANIFEST = "manifest.json"
CHECKED_AT_OPEN = 2**30
"""Bytes whose checksums are checked whenever an index is opened: about half a second."""
PACKAGES = ("bm25s", "tantivy", "pyseismic-lsr", "faiss-cpu", "sentence-transformers")


def save_index(retriever: BM25Retriever, folder: str | Path) -> Path:
    """Write a BM25 index that is in memory, whole or not at all. An index that stood there is replaced.

    Raises IndexFolderError where something else stands there.
    """
    folder = Path(folder)
    refuse_other_folder(folder)
    ranker = retriever.ranker
    assert isinstance(ranker, BM25Ranker)
    with atomic_folder(folder) as temporary:
        ranker.scorer.save(temporary, allow_pickle=False, show_progress=False)
        documents = retriever.documents
        write_documents(temporary, (documents[place] for place in range(len(documents))))
        write_manifest(temporary, "bm25", retriever.corpus_digest, len(documents), ranker.identity)
    return folder


def write_manifest(
    folder: Path,
    kind: str,
    corpus_digest: str,
    documents: int,
    options: Mapping[str, Any],
    counted: Callable[[int, int], None] = lambda done, files: None,
    leave_out: Sequence[str] = (),
) -> None:
    """Write the manifest, which lists every other file; it is written last.

    counted: called with the number of files that are read and of all. leave_out: names of files that are no
    part of the index.
    """
    skipped = {MANIFEST, *leave_out}
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in skipped)
    listed = {}
    for done, file in enumerate(files):
        counted(done, len(files))
        _sync(file)
        listed[str(file.relative_to(folder))] = {
            "bytes": file.stat().st_size,
            "sha256": sha256_file(file),
            "crc32": crc32_file(file),
        }
    counted(len(files), len(files))
    manifest = {
        "format": FORMAT,
        "kind": kind,
        "documents": documents,
        "corpus_digest": corpus_digest,
        "options": dict(options),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "files": listed,
    }
    write_json(folder / MANIFEST, {**manifest, "sha256": manifest_digest(manifest)})


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """Hex SHA-256 of a manifest's other fields, kept in its field `sha256`."""
    return sha256_rows([{name: value for name, value in manifest.items() if name != "sha256"}])


def _sync(file: Path) -> None:
    """On the disk before the manifest says that it is there; the libraries do not see to that."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def crc32_file(path: Path) -> int:
    """Finds every single changed bit, at more than twice the speed of SHA-256."""
    state = 0
    with path.open("rb") as file:
        while piece := file.read(2**20):
            state = zlib.crc32(piece, state)
    return state


def check_index(
    folder: str | Path, counted: Callable[[int, int], None] = lambda done, files: None
) -> dict[str, Any]:
    """Read every byte of an index folder; returns {"kind", "documents", "files", "bytes"}.

    Raises IndexFolderError that names the first file whose bytes are not those that were written.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    files = manifest["files"]
    _check_sizes(folder, files)
    for done, (name, expected) in enumerate(files.items()):
        counted(done, len(files))
        if sha256_file(folder / name) != expected.get("sha256"):
            raise _changed(folder / name)
    counted(len(files), len(files))
    size = sum(expected["bytes"] for expected in files.values())
    return {
        "kind": manifest["kind"],
        "documents": manifest["documents"],
        "files": len(files),
        "bytes": size,
    }


def load_index(
    folder: str | Path, corpus_digest: str | None = None, *, verify: bool = False, encoder: str = ""
) -> CorpusRetriever:
    """Open an index folder, memory-mapped. `verify` reads every file and checks its SHA-256 first.

    Without it the sizes of all files are checked, and the checksums of as many as add up to CHECKED_AT_OPEN
    bytes, the smallest first; `check_index` is for the rest of a large index.
    `encoder` is where the encoder of a dense index lies now, if it has moved; it must be the same one.
    Raises IndexFolderError where the folder is missing, damaged, of another format, or was built from a
    corpus other than the one with `corpus_digest` (see `corpus.documents_digest`), or by another encoder;
    ModelError where the encoder cannot be loaded; ConfigError where the extra for vectors is not installed.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    built_from = manifest["corpus_digest"]
    if corpus_digest is not None and corpus_digest != built_from:
        raise IndexFolderError(
            f"{folder}: built from another corpus (its digest is {built_from[:12]}…, the given corpus has "
            f"{corpus_digest[:12]}…); build the index again"
        )
    if verify:
        check_index(folder)
    _check_sizes(folder, manifest["files"])
    _check_small(folder, manifest["files"])
    for kind in {manifest["kind"], *manifest["options"].get("parts", ())} & EXTRAS.keys():
        import_module(EXTRAS[kind])  # here, because a missing extra is no damage
    try:
        documents = StoredDocuments(folder)
        ranker = OPENERS[manifest["kind"]](folder, manifest["options"], encoder)
    except (IndexFolderError, ModelError):
        raise
    except Exception as error:  # what a library says to bytes that it did not write
        raise IndexFolderError(f"{folder}: damaged: {type(error).__name__}: {error}") from None
    if not len(documents) == len(ranker) == manifest["documents"]:
        raise IndexFolderError(f"{folder}: damaged: its files disagree on the number of documents")
    return CorpusRetriever(ranker, documents, built_from)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of an index folder of this format. Raises IndexFolderError."""
    folder, path = Path(folder), Path(folder) / MANIFEST
    if folder.is_file():
        raise IndexFolderError(
            f"{folder}: a file, no index folder; where it is a corpus, build an index of it with: "
            f"rexrag index build {folder} --out {folder.name.split('.')[0] or 'corpus'}-index"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise IndexFolderError(f"{folder}: no index here (no {MANIFEST})") from None
    except (OSError, ValueError, RecursionError) as error:
        raise IndexFolderError(f"{path}: damaged: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise IndexFolderError(f"{path}: expected an index of format {FORMAT}; build the index again")
    if manifest.get("kind") not in OPENERS:
        raise IndexFolderError(
            f"{path}: kind is {manifest.get('kind')!r}; expected one of {', '.join(OPENERS)}"
        )
    shape: dict[str, type] = {"documents": int, "corpus_digest": str, "options": dict, "files": dict}
    for key, kind in shape.items():
        if not isinstance(manifest.get(key), kind):
            raise IndexFolderError(f"{path}: damaged: field '{key}' is missing or of another type")
    unknown = [key for key in manifest if key not in (*shape, "format", "kind", "versions", "sha256")]
    if unknown or manifest.get("sha256", manifest_digest(manifest)) != manifest_digest(manifest):
        raise IndexFolderError(f"{path}: damaged: not what was written; build the index again")
    return manifest


def refuse_other_folder(folder: Path) -> None:
    """Raises IndexFolderError where a path holds anything but an index or an empty folder."""
    empty = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not empty and not (folder / MANIFEST).is_file():
        raise IndexFolderError(f"{folder}: exists and is not an index folder; it is left as it is")


def _open_bm25(folder: Path, given: Mapping[str, Any], encoder: str) -> Ranker:
    options = BM25Options(**given)
    _check_splitter(folder, options.words)
    scorer = bm25s.BM25.load(
        folder, mmap=True, allow_pickle=False, load_corpus=False, override_params={"backend": "numpy"}
    )
    # Plain views of the mapped arrays: slicing numpy's memmap class costs more than the search.
    for name in ("data", "indices", "indptr"):
        scorer.scores[name] = scorer.scores[name].view(np.ndarray)
    arrays = scorer.scores
    if len(arrays["indptr"]) != len(scorer.vocab_dict) + 1 or arrays["indptr"][-1] != len(arrays["data"]):
        raise IndexFolderError(f"{folder}: damaged: its vocabulary and scores disagree")
    return BM25Ranker(scorer, options)


def _open_tantivy(folder: Path, given: Mapping[str, Any], encoder: str) -> Ranker:
    from rexrag.retrieval.rankers.tantivy import TantivyRanker

    _check_splitter(folder, given["words"])
    return TantivyRanker(folder, given["words"])


def _open_seismic(folder: Path, given: Mapping[str, Any], encoder: str) -> Ranker:
    from rexrag.retrieval.rankers.seismic import FastOptions, SeismicRanker

    bm25 = BM25Options(**given["bm25"])
    _check_splitter(folder, bm25.words)
    return SeismicRanker(folder, int(given["documents"]), bm25, FastOptions(**given["fast"]))


def _open_dense(folder: Path, given: Mapping[str, Any], encoder: str) -> Ranker:
    from rexrag.retrieval.rankers.dense import DenseOptions, DenseRanker
    from rexrag.retrieval.rankers.encoder import Encoder, EncoderCard

    settings = dict(given)
    card = EncoderCard(**settings.pop("encoder"))
    options = DenseOptions(**settings)
    found = Encoder(encoder or card.model, query_prefix=card.query_prefix, passage_prefix=card.passage_prefix)
    different = card.difference(found.card)
    if different:
        raise IndexFolderError(
            f"{folder}: made by another encoder than '{found.card.model}' ({different} differs); "
            f"it was made by '{card.model}'"
        )
    return DenseRanker(folder, found, options)


def _open_hybrid(folder: Path, given: Mapping[str, Any], encoder: str) -> Ranker:
    from rexrag.retrieval.rankers.hybrid import FusionOptions, HybridRanker

    settings = dict(given)
    parts = settings.pop("parts")
    rankers = [OPENERS[kind](folder, options, encoder) for kind, options in parts.items()]
    return HybridRanker(rankers, FusionOptions(**settings))


OPENERS: dict[str, Callable[[Path, Mapping[str, Any], str], Ranker]] = {
    "bm25": _open_bm25,
    "bm25-disk": _open_tantivy,
    "bm25-fast": _open_seismic,
    "dense": _open_dense,
    "hybrid": _open_hybrid,
}
"""How a kind of index is opened: (folder, options of the manifest, encoder or "")."""
EXTRAS = {"bm25-fast": "rexrag.retrieval.rankers.seismic", "dense": "rexrag.retrieval.rankers.dense"}
"""Modules that need an extra, by the kind of index they open."""


def _check_splitter(folder: Path, words: str) -> None:
    if words not in (SPACED, UNSPACED):
        raise IndexFolderError(f"{folder}: words were split by '{words}'; build the index again")


def _check_sizes(folder: Path, files: Mapping[str, Any]) -> None:
    """Each listed file is there and whole: a cut-off copy is the usual damage."""
    for name, expected in files.items():
        path = folder / name
        known = expected if isinstance(expected, Mapping) else {}
        if not path.is_file() or path.stat().st_size != known.get("bytes"):
            raise IndexFolderError(f"{path}: missing or cut off; build the index again")


def _check_small(folder: Path, files: Mapping[str, Any]) -> None:
    """The checksums of the smallest files, as many as add up to CHECKED_AT_OPEN bytes."""
    total = 0
    for name, expected in sorted(files.items(), key=lambda item: int(item[1]["bytes"])):
        total += expected["bytes"]
        if total > CHECKED_AT_OPEN:
            return
        path = folder / name
        # Folders of earlier versions have no crc32.
        whole = (
            crc32_file(path) == expected["crc32"]
            if "crc32" in expected
            else sha256_file(path) == expected.get("sha256")
        )
        if not whole:
            raise _changed(path)


def _changed(path: Path) -> IndexFolderError:
    return IndexFolderError(f"{path}: its bytes have changed since it was written; build the index again")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
