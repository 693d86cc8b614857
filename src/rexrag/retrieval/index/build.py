"""Building an index folder from a corpus file: streamed, with progress, and resumed after a kill.

Work goes on in `OUT.partial`, which becomes `OUT` when all is there. Its `build.json` names corpus, options
and the stages that are finished; the same command goes on with the first one that is not. tantivy and the
encoder also go on inside a stage, from their last commit.

| stage | kinds | memory |
|---|---|---|
| documents | all | 16 bytes a passage |
| words | bm25 | all word numbers and scores: see `plan` |
| words | bm25-disk | the writer's heap |
| words | bm25-fast | all (word, passage) pairs and the index: see `plan` |
| vectors | dense | a chunk of passages and the encoder |
| ann | dense, not flat | the approximate index |
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rexrag.errors import ConfigError, DataError, IndexFolderError
from rexrag.io import replace_folder, write_json
from rexrag.retrieval.corpus import read_corpus
from rexrag.retrieval.index.documents import StoredDocuments, write_documents
from rexrag.retrieval.index.folder import refuse_other_folder, write_manifest
from rexrag.retrieval.rankers.bm25 import BM25Options, BM25Ranker
from rexrag.retrieval.rankers.hybrid import FusionOptions

LEXICAL = ("bm25", "bm25-disk", "bm25-fast")
KINDS = (*LEXICAL, "dense", "hybrid")
MANY_PASSAGES = 200_000
"""From here on bm25-disk: bm25 needs all words in memory to build, and a search adds up all their scores."""
STATE = "build.json"


class Progress(Protocol):
    """Hears how far a stage is; `total` is an estimate in the first stage."""

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
    `out` holds something else, or an unfinished build of something else.
    """
    out = Path(out)
    refuse_other_folder(out)
    tell: Progress = progress or (lambda stage, done, total: None)
    partial = out.with_name(f"{out.name}.partial")
    with _claimed(partial, Path(corpus), options, restart) as state:
        if "corpus_digest" not in state:
            rows = read_corpus(corpus, unique=False)
            digest = write_documents(partial, rows, lambda done: tell("documents", done, documents), corpus)
            state["corpus_digest"] = digest
            write_json(partial / STATE, state)
        stored = StoredDocuments(partial)
        recorded: dict[str, Mapping[str, Any]] = {}
        if options.lexical_part:
            recorded[options.lexical_part] = _lexical(partial, stored, options, state, tell)
        if options.dense_part:
            recorded["dense"] = _dense(partial, stored, options, state, tell)
        whole = {**asdict(options.fusion), "parts": recorded} if options.kind == "hybrid" else None
        write_manifest(
            partial,
            options.kind,
            state["corpus_digest"],
            len(stored),
            whole or recorded[options.kind],
            lambda done, files: tell("checking", done, files),
            aside=(STATE,),
        )
        replace_folder(partial, out)
        (out / STATE).unlink(missing_ok=True)  # last: until then the same command goes on
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    facts = {"documents": len(stored), "corpus_digest": state["corpus_digest"], "bytes": size}
    return facts | {"recall": state["words"]["recall"]} if options.lexical_part == "bm25-fast" else facts


def _lexical(
    folder: Path, stored: StoredDocuments, options: BuildOptions, state: dict[str, Any], tell: Progress
) -> Mapping[str, Any]:
    def counted(done: int) -> None:
        tell("words", done, len(stored))

    if options.lexical_part == "bm25":
        if "words" not in state:
            ranker = BM25Ranker.build(stored.texts(), options.bm25, counted)
            ranker.scorer.save(folder, allow_pickle=False, show_progress=False)
            _finish(folder, state, "words", dict(ranker.identity))
    elif options.lexical_part == "bm25-fast":
        from rexrag.retrieval.rankers.seismic import FastOptions, build_seismic

        if "words" not in state:
            fast = FastOptions()
            recall = build_seismic(folder, stored.texts(), options.bm25, fast, counted)
            recorded = {"documents": len(stored), "bm25": asdict(options.bm25), "fast": asdict(fast)}
            _finish(folder, state, "words", {**recorded, "recall": recall})
    else:
        from rexrag.retrieval.rankers.tantivy import build_tantivy

        if "words" not in state:
            build_tantivy(folder, stored.texts, counted)
            _finish(folder, state, "words", {"words": options.bm25.words})
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
    dense = DenseOptions(**options.dense).settled(len(stored), encoder.card.dimension)
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
    if partial.exists() and not (partial / STATE).is_file() and any(partial.iterdir()):
        raise IndexFolderError(f"{partial}: exists and is no unfinished build; it is left as it is")
    partial.mkdir(parents=True, exist_ok=True)
    with (partial.parent / f".{partial.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise IndexFolderError(f"{partial}: another build is writing here") from None
        if restart and (partial / STATE).is_file():
            shutil.rmtree(partial)
            partial.mkdir()
        state = _read_state(partial, asked)
        write_json(partial / STATE, state)
        try:
            yield state
        except (ConfigError, DataError):
            shutil.rmtree(partial)
            raise
        finally:
            Path(lock.name).unlink(missing_ok=True)


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
