"""Building an index folder from a corpus file: streamed, with progress, and resumed after a kill.

The work is done in `OUT.partial`, which is renamed to `OUT` when it is whole. Its `build.json` names corpus,
options and the finished stages; the same command goes on with the first unfinished one. tantivy and the
encoder also go on inside a stage, from their last commit.

| stage | kinds | memory |
|---|---|---|
| documents | all | 16 bytes a passage |
| words | bm25 | all word numbers and scores: see `estimate` |
| words | bm25-disk | the writer's heap |
| words | bm25-fast | all (word, passage) pairs and the index: see `estimate` |
| vectors | dense | a chunk of passages and the encoder |
| ann | dense, not flat | the approximate index |
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from rexrag.errors import ConfigError, DataError, IndexFolderError
from rexrag.io import is_temporary, replace_folder, sweep, temporary_name, write_json
from rexrag.retrieval.corpus import read_corpus
from rexrag.retrieval.index.documents import StoredDocuments, write_documents
from rexrag.retrieval.index.folder import refuse_other_folder, write_manifest
from rexrag.retrieval.rankers.bm25 import SPACED, UNSPACED, BM25Options, BM25Ranker, has_unspaced
from rexrag.retrieval.rankers.hybrid import FusionOptions

LEXICAL = ("bm25", "bm25-disk", "bm25-fast")
KINDS = (*LEXICAL, "dense", "hybrid")
MANY_PASSAGES = 200_000
"""From here on bm25-disk: bm25 needs all words in memory to build, and a search adds up all their scores."""
STATE = "build.json"
STRAYS = (".*.tmp", "*.tmp", ".tmp*", "*.partial", ".tantivy-*.lock")
"""Names under which we, tantivy and faiss write what is not finished."""
DISK_FULL = ("No space left on device", "Disk quota exceeded", "os error 28", "os error 122", "requested and")
"""What tantivy, faiss and numpy (`9 requested and 2 written`) say, in errors without a number."""


class Progress(Protocol):
    """Called with how far a stage is; `total` is an estimate in the first stage."""

    def __call__(self, stage: str, done: int, total: int) -> None: ...


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """What to build. `ann` and what follows belong to `dense` and `hybrid`."""

    kind: str = "bm25"
    lexical: str = "bm25-disk"
    """hybrid: which BM25 stands beside the vectors."""
    bm25: BM25Options = field(default_factory=BM25Options)
    encoder: str = ""
    query_prefix: str | None = None
    """None: what the model's files or its name say (`encoder.known_prefixes`)."""
    passage_prefix: str | None = None
    dense: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `dense.DenseOptions`."""
    fusion: FusionOptions = field(default_factory=FusionOptions)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"--kind {self.kind}: expected one of {', '.join(KINDS)}")
        if self.lexical not in LEXICAL:
            raise ConfigError(f"lexical is '{self.lexical}'; expected one of {', '.join(LEXICAL)}")
        if self.dense_part and not self.encoder:
            raise ConfigError(f"--kind {self.kind} needs --encoder, a sentence-transformers folder or id")
        if self.lexical_part == "bm25-disk" and (self.bm25.k1, self.bm25.b) != (1.2, 0.75):
            raise ConfigError("bm25-disk has k1 = 1.2 and b = 0.75 only; bm25 and bm25-fast take others")

    @property
    def lexical_part(self) -> str:
        return {"dense": "", "hybrid": self.lexical}.get(self.kind, self.kind)

    @property
    def dense_part(self) -> bool:
        return self.kind in ("dense", "hybrid")


def build_index(
    corpus: str | Path,
    out: str | Path,
    options: BuildOptions,
    progress: Progress | None = None,
    *,
    documents: int = 0,
    restart: bool = False,
) -> dict[str, Any]:
    """Build or go on building; returns {"documents", "corpus_digest", "bytes"}, of bm25-fast "recall" too.

    `documents` is an estimate for the progress of the first stage. `restart` throws away what an earlier call
    left. Raises DataError (corpus), ConfigError (options), ModelError (encoder), and IndexFolderError where
    `out` holds something else, or an unfinished build of something else, or the disk is full.
    """
    out = Path(out)
    refuse_other_folder(out)
    tell: Progress = progress or (lambda stage, done, total: None)
    partial = out.with_name(f"{out.name}.partial")
    with _claimed(partial, Path(corpus), options, restart) as state, _naming_a_full_disk(partial):
        if "corpus_digest" not in state:
            rows = read_corpus(corpus, unique=False)
            digest = write_documents(partial, rows, lambda done: tell("documents", done, documents), corpus)
            _finish(partial, state, "corpus_digest", digest)
        stored = StoredDocuments(partial)
        recorded: dict[str, Mapping[str, Any]] = {}
        if options.lexical_part:
            recorded[options.lexical_part] = _lexical(partial, stored, options, state, tell)
        if options.dense_part:
            recorded["dense"] = _dense(partial, stored, options, state, tell)
        whole = {**asdict(options.fusion), "parts": recorded} if options.kind == "hybrid" else None
        _remove_strays(partial)
        write_manifest(
            partial,
            options.kind,
            state["corpus_digest"],
            len(stored),
            whole or recorded[options.kind],
            lambda done, files: tell("checking", done, files),
            leave_out=(STATE,),
        )
        replace_folder(partial, out)
        (out / STATE).unlink(missing_ok=True)  # last: until then the same command goes on
    sweep(out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    facts = {"documents": len(stored), "corpus_digest": state["corpus_digest"], "bytes": size}
    return facts | {"recall": state["words"]["recall"]} if options.lexical_part == "bm25-fast" else facts


def _lexical(
    folder: Path, stored: StoredDocuments, options: BuildOptions, state: dict[str, Any], tell: Progress
) -> Mapping[str, Any]:
    def counted(done: int) -> None:
        tell("words", done, len(stored))

    if "words" not in state:
        splitter = UNSPACED if any(map(has_unspaced, stored.texts())) else SPACED
        bm25 = replace(options.bm25, words=splitter)
        recorded: dict[str, Any] = {"words": splitter}
        if options.lexical_part == "bm25":
            ranker = BM25Ranker.build(stored.texts(), bm25, counted)
            ranker.scorer.save(folder, allow_pickle=False, show_progress=False)
            recorded = dict(ranker.identity)
        elif options.lexical_part == "bm25-fast":
            from rexrag.retrieval.rankers.seismic import FastOptions, build_seismic

            fast = FastOptions()
            recall = build_seismic(folder, stored.texts(), bm25, fast, counted)
            recorded = {
                "documents": len(stored),
                "bm25": asdict(bm25),
                "fast": asdict(fast),
                "recall": recall,
            }
        else:
            from rexrag.retrieval.rankers.tantivy import build_tantivy

            build_tantivy(folder, stored.texts, counted)
        _finish(folder, state, "words", recorded)
    found: Mapping[str, Any] = state["words"]
    return found


def _dense(
    folder: Path, stored: StoredDocuments, options: BuildOptions, state: dict[str, Any], tell: Progress
) -> Mapping[str, Any]:
    from rexrag.retrieval.rankers.dense import DenseOptions, build_ann, build_vectors, tidy
    from rexrag.retrieval.rankers.encoder import Encoder

    encoder = Encoder(
        options.encoder, query_prefix=options.query_prefix, passage_prefix=options.passage_prefix
    )
    dense = DenseOptions(**options.dense).resolved(len(stored), encoder.card.dimension)
    card = asdict(encoder.card)
    if state.setdefault("encoder", card) != card:
        raise IndexFolderError(
            f"{folder}: begun with another encoder ({state['encoder']['model']}); --restart throws it away"
        )
    write_json(folder / STATE, state)
    if "vectors" not in state:
        build_vectors(
            folder, stored.texts, len(stored), encoder, lambda done: tell("vectors", done, len(stored))
        )
        _finish(folder, state, "vectors", True)
    if "ann" not in state:
        build_ann(folder, dense, lambda done: tell("ann", done, len(stored)))
        _finish(folder, state, "ann", True)
    tidy(folder, dense)
    return {"encoder": card, **asdict(dense)}


def _finish(folder: Path, state: dict[str, Any], stage: str, value: object) -> None:
    state[stage] = value
    write_json(folder / STATE, state)


def _remove_strays(folder: Path) -> None:
    """Remove what a killed build left under temporary names: it must not get into the manifest."""
    for pattern in STRAYS:
        for path in folder.rglob(pattern):
            if path.is_file():
                path.unlink()


@contextmanager
def _naming_a_full_disk(partial: Path) -> Iterator[None]:
    """The libraries' errors about a full disk name no file and no number; this one does."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full and not any(words in str(error) for words in DISK_FULL):
            raise
        written = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
        free = shutil.disk_usage(partial).free
        raise IndexFolderError(
            f"{partial}: no space left on the disk: {written / 1e6:,.1f} MB are written, "
            f"{free / 1e6:,.1f} MB are free; make room, and the same command goes on (--dry-run says what it "
            "needs)"
        ) from None


@contextmanager
def _claimed(
    partial: Path, corpus: Path, options: BuildOptions, restart: bool = False
) -> Iterator[dict[str, Any]]:
    """The state of the build in `partial`, new or continued; one process at a time.

    After a mistake in the input (nothing that going on could mend) the folder is removed.
    """
    try:
        facts = corpus.stat()
    except OSError as error:
        raise DataError(error.strerror or "not readable", file=corpus) from None
    asked = json.loads(json.dumps(asdict(options)))
    asked["corpus"] = [str(corpus.absolute()), facts.st_size, facts.st_mtime_ns]
    partial.parent.mkdir(parents=True, exist_ok=True)
    with (partial.parent / f".{partial.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise IndexFolderError(f"{partial}: another build is writing here") from None
        try:
            sweep(partial)
            if partial.exists() and not _is_ours(partial):
                raise IndexFolderError(f"{partial}: exists and is no unfinished build; it is left as it is")
            if restart:
                _discard(partial)
            partial.mkdir(exist_ok=True)
            state = _read_state(partial, asked)
            write_json(partial / STATE, state)
            try:
                yield state
            except (ConfigError, DataError):
                _discard(partial)
                raise
        finally:
            Path(lock.name).unlink(missing_ok=True)


def _is_ours(partial: Path) -> bool:
    """An unfinished build: its state is there, or nothing but what a kill before that leaves."""
    return (partial / STATE).is_file() or (partial.is_dir() and all(map(is_temporary, partial.iterdir())))


def _discard(partial: Path) -> None:
    """Remove an unfinished build. Renamed first: killed in the middle, what is left is known for a stray."""
    if partial.exists():
        away = temporary_name(partial)
        os.replace(partial, away)
        shutil.rmtree(away)


def _read_state(partial: Path, asked: dict[str, Any]) -> dict[str, Any]:
    path = partial / STATE
    if not path.is_file():
        return {"asked": asked}
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        begun = state["asked"]
    except (ValueError, KeyError, TypeError):
        raise IndexFolderError(f"{path}: damaged; --restart throws the unfinished build away") from None
    different = [key for key in asked if begun.get(key) != asked[key]]
    if different:
        raise IndexFolderError(
            f"{partial}: an unfinished build with another {different[0]}; finish it with its own options, or "
            "throw it away with --restart"
        )
    return state
