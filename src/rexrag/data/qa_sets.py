"""The seven question answering sets of the paper, from local files or a hub, and samples of them.

| shape | where it is looked for |
|---|---|
| FlashRAG jsonl | `FOLDER/nq/test.jsonl`, `FOLDER/nq.jsonl`; on a hub, one configuration a set |
| Search-R1 parquet | `FOLDER/test.parquet` or a file, told apart by `data_source`; on a hub, split `test` |
| any other | a file that `data.question_files` reads, named after the file; or a folder with `dev.jsonl` |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rexrag.data.apportion import apportion
from rexrag.data.question_files import PACKED, READERS, file_format, file_stem
from rexrag.data.questions import collect_questions, load_questions, questions_digest, rank_questions
from rexrag.errors import ConfigError, DataError
from rexrag.types import Question


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A published set: the split that is evaluated, how many questions it has, and its other names."""

    title: str
    split: str
    size: int
    aliases: tuple[str, ...] = ()


BENCHMARKS: Mapping[str, Benchmark] = MappingProxyType(
    {
        "nq": Benchmark("NQ", "test", 3_610, ("natural_questions", "nq_open", "nq_open.dev", "nq_test")),
        "triviaqa": Benchmark("TriviaQA", "test", 11_313, ("trivia_qa", "tqa")),
        "popqa": Benchmark("PopQA", "test", 14_267),
        "hotpotqa": Benchmark(
            "HotpotQA",
            "dev",
            7_405,
            ("hotpot_qa", "hotpot", *(f"hotpot_dev_{k}_v1" for k in ("fullwiki", "distractor"))),
        ),
        "2wikimultihopqa": Benchmark("2Wiki", "dev", 12_576, ("2wiki",)),
        "musique": Benchmark("MuSiQue", "dev", 2_417, ("musique_ans_v1.0_dev",)),
        "bamboogle": Benchmark("Bamboogle", "test", 125),
    }
)
"""In the paper's order, under FlashRAG's names; splits and sizes as Search-R1 evaluates them (arXiv
2503.09516), 51,713 questions in all."""

LONE_STEMS = ("test", "dev")
"""A folder that is no collection of sets may hold one of these, in any format."""


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """Questions to evaluate on. `name` is a key of BENCHMARKS where it is one of the seven."""

    name: str
    split: str
    questions: list[Question]
    source: str
    """Where they came from, for the record."""
    strata: Mapping[str, int]
    """Of a sample: how many questions each stratum has in the whole set, by `stratum`. Else one stratum."""
    digest: str
    """Of the whole set, so that samples of one set share what was computed."""
    stratified: bool = False

    @property
    def title(self) -> str:
        known = BENCHMARKS.get(self.name)
        return known.title if known else self.name

    @property
    def whole(self) -> int:
        """How many questions the set had before a sample was drawn."""
        return sum(self.strata.values())

    def stratum(self, question: Question) -> str:
        return stratum(question) if self.stratified else ""


def load_sets(source: str, wanted: Sequence[str] = (), partly: bool = False) -> list[QuestionSet]:
    """The sets of a file, a folder or a hub id; `wanted` names some of the seven, in any of their spellings.

    partly: those of them that are here. Without, one that is missing is a DataError.
    Raises DataError (file, row, field), ConfigError for an unknown set or where a hub needs `datasets`.
    """
    names = [canonical(name) for name in wanted]
    path = Path(source).expanduser()
    if path.is_dir():
        found = _from_folder(path, names)
    elif path.exists() or file_format(path) in READERS:
        found = _from_file(path)
    elif source.count("/") == 1 and not source.startswith((".", "/", "~")):
        found = list(_from_hub(source, names))
    else:
        raise DataError("no such file, folder or hub id (owner/name)", file=source)
    chosen = [one for one in found if not names or one.name in names]
    missing = [name for name in names if name not in {one.name for one in chosen}]
    if missing and not partly:
        _refuse_unknown(missing)
        here = ", ".join(one.name for one in found)
        raise DataError(f"no set '{missing[0]}' here{f'; found: {here}' if here else ''}", file=source)
    return chosen


def sample(whole: QuestionSet, limit: int, seed: int = 0, stratify: bool = False) -> QuestionSet:
    """At most `limit` questions drawn without replacement, in their old order; 0 takes all.

    Which ones depends on `seed` and each question's group alone, not on the file's order, and a smaller
    sample is part of a larger one. `stratify` draws from each kind (kind and hops) its share, rounded by
    largest remainder; a stratum too small for a place gets none. Because of the rounding, a smaller
    stratified sample need not be part of a larger one.
    """
    questions = whole.questions
    if not limit or limit >= len(questions):
        return whole
    ranked = rank_questions(questions, seed)
    by_stratum = {"": ranked}
    if stratify:
        by_kind = sorted(ranked, key=stratum)  # stable: ranks stay in order within a stratum
        by_stratum = {key: list(group) for key, group in groupby(by_kind, key=stratum)}
    sizes = {key: len(group) for key, group in by_stratum.items()}
    keys = sorted(sizes)
    shares = dict(zip(keys, apportion(limit, [sizes[key] for key in keys]), strict=True))
    chosen = {question.group for key, group in by_stratum.items() for question in group[: shares[key]]}
    kept = [question for question in questions if question.group in chosen]
    return replace(whole, questions=kept, strata=sizes, stratified=stratify)


def stratum(question: Question) -> str:
    """What a stratified sample keeps the proportions of."""
    return f"{question.kind}/{question.hops}"


def canonical(name: str) -> str:
    """FlashRAG's name of a benchmark, from any spelling; another name as it is."""
    wanted = name.strip().lower().replace("-", "_")
    for known, benchmark in BENCHMARKS.items():
        if wanted in (known, benchmark.title.lower(), *benchmark.aliases):
            return known
    return name


def _from_folder(folder: Path, names: Sequence[str]) -> list[QuestionSet]:
    found = []
    for name in names or BENCHMARKS:
        if name in BENCHMARKS:
            file = _file_of(folder, name)
            found += [] if file is None else [whole_set(name, load_split(file, name), str(file))]
    if found:
        return found
    lone = next((file for stem in LONE_STEMS if (file := _file(folder, stem))), None)
    if lone is None:
        _refuse_unknown(names)
        expected = "nq.jsonl, nq/test.jsonl (FlashRAG), test.parquet (Search-R1) or dev.jsonl"
        raise DataError(f"no benchmark in this folder; expected for example {expected}", file=folder)
    return _from_file(lone, canonical(folder.name))


def _refuse_unknown(names: Sequence[str]) -> None:
    for name in names:
        if name not in BENCHMARKS:
            raise ConfigError(f"--sets {name}: not known; expected some of {', '.join(BENCHMARKS)}")


def _file_of(folder: Path, name: str) -> Path | None:
    """The file of a set in a folder, under any of the set's names, in any format."""
    benchmark = BENCHMARKS[name]
    for alias in (name, *benchmark.aliases):
        for stem in (f"{alias}/{benchmark.split}", alias, f"{alias}_{benchmark.split}"):
            found = _file(folder, stem)
            if found is not None:
                return found
    return None


def _file(folder: Path, stem: str) -> Path | None:
    names = (f"{stem}{suffix}{packing}" for packing in ("", *PACKED) for suffix in READERS)
    return next((folder / name for name in names if (folder / name).is_file()), None)


def load_split(file: Path, name: str) -> list[Question]:
    """The questions of one set's file; rows that name another source keep it."""
    benchmark = BENCHMARKS.get(name)
    return load_questions(file, source=name, split=benchmark.split if benchmark else file_stem(file))


def _from_file(file: Path, name: str = "") -> list[QuestionSet]:
    """The sets in one file, told apart by the source that its rows name."""
    stem = canonical(file_stem(file))
    if stem not in BENCHMARKS and stem in ("test", "dev", "train"):
        stem = name or canonical(file.absolute().parent.name)
    return _by_source(load_split(file, stem), str(file))


def _by_source(questions: Sequence[Question], source: str) -> list[QuestionSet]:
    by_source: dict[str, list[Question]] = {}
    for question in questions:
        by_source.setdefault(canonical(question.source), []).append(question)
    order = list(BENCHMARKS)
    ordered = sorted(by_source, key=lambda name: order.index(name) if name in order else len(order))
    return [whole_set(name, by_source[name], source) for name in ordered]


def _from_hub(source: str, names: Sequence[str]) -> Iterator[QuestionSet]:
    """FlashRAG's layout (a configuration a set) or Search-R1's (one split for all). Needs `datasets`."""
    hub = _datasets()
    try:
        configurations = hub.get_dataset_config_names(source)
        known = {canonical(name): name for name in configurations}
        wanted = [name for name in names or BENCHMARKS if name in known and name in BENCHMARKS]
        if not wanted:
            rows = enumerate(hub.load_dataset(source, split="test"), 1)
            yield from _by_source(collect_questions(source, rows, "local", "test"), source)
        for name in wanted:
            split = BENCHMARKS[name].split
            rows = enumerate(hub.load_dataset(source, known[name], split=split), 1)
            where = f"{source} {known[name]}/{split}"
            yield whole_set(name, collect_questions(where, rows, name, split), where)
    except DataError:
        raise
    except Exception as error:  # the hub, the network and the file formats each have exceptions of their own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"not readable from the hub: {reason[:300]}", file=source) from None


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            "a data set of a hub needs the package `datasets`: pip install -e '.[hub]'; "
            "a folder of files needs nothing"
        ) from None
    return datasets


def whole_set(name: str, questions: list[Question], source: str) -> QuestionSet:
    """All of a set. Raises DataError where there is nothing in it."""
    if not questions:
        raise DataError("no questions; expected at least one", file=source)
    digest = questions_digest(questions)
    return QuestionSet(name, questions[0].split, questions, source, {"": len(questions)}, digest)
