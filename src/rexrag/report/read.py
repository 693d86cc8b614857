"""Read a run folder, finished or still going.

A run that is still going has no `summary.json`, short files, and perhaps half a last line. All of that is
read as far as it goes and said in `Run.notes`. Damage anywhere else is a DataError that names file and row.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from rexrag.config.schema import ENDLESS, SPENT
from rexrag.config.upgrade import ARMS, algorithm_of
from rexrag.errors import DataError
from rexrag.experiments.analysis import run_folder
from rexrag.training.verdict import Verdict, judge

Row = Mapping[str, Any]

COMPARISON = "compare.json"
BESIDE_CONFIG = ("environment.json", "metrics.jsonl", "eval.jsonl", "summary.json")
"""A run folder holds config.toml and at least one of these."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A score in [0, 1], or a difference of two, with its 95 % interval; `n` questions or seeds."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None

    @classmethod
    def of(cls, value: Mapping[str, float]) -> Estimate:
        """From what `rexrag.stats` returns."""
        return cls(value["value"], value["low"], value["high"], int(value["n"]))


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One row of `eval.jsonl`."""

    step: int
    spent: Mapping[str, float]
    """Counts so far, those that it has: tokens, rollouts, seconds."""
    set: str
    em: Estimate
    f1: Estimate | None
    by_hops: Mapping[str, Estimate]
    searches: float | None
    unanswered: float | None
    invalid: float | None
    """Turns without a valid action, a question."""
    by_question: Sequence[float]
    """EM of each question, in the order of the set; empty where it was not recorded."""


@dataclass(frozen=True, slots=True)
class Run:
    """What a run folder holds. `arm`: its algorithm or ablation; `notes`: what is missing or was left out."""

    folder: Path
    name: str
    arm: str
    seed: int
    control: bool
    config: Mapping[str, Any]
    config_text: str
    environment: Row
    metrics: Sequence[Row]
    evaluations: Sequence[Evaluation]
    summary: Row | None
    verdict: Verdict
    notes: Sequence[str]

    @property
    def label(self) -> str:
        return f"{self.arm}, seed {self.seed}"

    @property
    def finished(self) -> bool:
        return self.summary is not None

    @property
    def rollouts(self) -> Path:
        return self.folder / "rollouts.jsonl.zst"

    def steps(self) -> tuple[int, int | None]:
        """Steps done, and steps planned where the configuration says so (a billion is no plan)."""
        planned = number(self.config.get("train", {}), "steps")
        planned = None if planned is None or planned >= ENDLESS else planned
        return _steps_done(self.summary, self.metrics), None if planned is None else int(planned)

    def spent(self, key: str) -> float | None:
        """`generated_tokens` or `seconds` of the whole run so far."""
        value = number(self.summary or {}, key)
        return value if value is not None else number(self.metrics[-1], key) if self.metrics else None

    def held_out_rows(self) -> list[Evaluation]:
        """Evaluations on the held-out questions, in order of step."""
        return [row for row in self.evaluations if row.set == "held-out"]

    def held_out(self) -> tuple[Estimate | None, Estimate | None]:
        """Held-out exact match before training and after it, or at the last evaluation so far."""
        if self.summary is not None:
            where = str(self.folder / "summary.json")
            before = _estimate(self.summary.get("em_before"), where, None, "em_before")
            return before, _estimate(self.summary.get("em_after"), where, None, "em_after")
        rows = self.held_out_rows()
        return (rows[0].em if rows else None), (rows[-1].em if len(rows) > 1 else None)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in the order given, each followed by its `control/`. A folder named twice is read once.

    Raises DataError where a folder is no run folder, naming what it lacks.
    """
    if not folders:
        raise DataError("a report needs at least one run folder")
    runs: list[Run] = []
    seen: set[Path] = set()
    for folder in map(Path, folders):
        candidates = [(folder, False)]
        if (folder / "control" / "config.toml").is_file():
            candidates.append((folder / "control", True))
        for path, control in candidates:
            if path.resolve() not in seen:
                seen.add(path.resolve())
                runs.append(read_run(path, control))
    return runs


def read_comparison(folder: Path) -> tuple[dict[str, Any], list[Path]]:
    """What `rexrag compare` found in `folder`, under today's names, and its run folders.

    Raises DataError where the file is damaged.
    """
    file = folder / COMPARISON
    found = _json_object(file) or {}
    missing = [key for key in ("control", "seeds", "budget", "amount", "arms") if key not in found]
    if missing or not isinstance(found["arms"], dict) or found["budget"] not in SPENT:
        raise DataError("expected what rexrag compare writes", file=file, field=(missing or ["arms"])[0])
    runs = [run_folder(folder, arm, seed) for arm in found["arms"] for seed in found["seeds"]]
    arms = {ARMS.get(arm, arm): figures for arm, figures in found["arms"].items()}
    return found | {"arms": arms, "control": ARMS.get(found["control"], found["control"])}, runs


def read_run(folder: Path, control: bool = False) -> Run:
    """Read one run folder. Raises DataError where it is none, or where a file is damaged before its end."""
    _check_is_run(folder)
    notes: list[str] = []
    config_text, config = _config(folder / "config.toml")
    summary = _json_object(folder / "summary.json")
    if summary is None:
        notes.append("summary.json is not there yet: the run is still going, or was stopped before its end")
    metrics = _by_step(folder / "metrics.jsonl", ("step",), notes)
    evaluations = [
        _evaluation(folder, n, row) for n, row in _by_step(folder / "eval.jsonl", ("step", "set"), notes)
    ]
    environment = _json_object(folder / "environment.json")
    if environment is None:
        notes.append("environment.json is missing: versions and digests are unknown")
    known = summary or {}
    return Run(
        folder=folder,
        name=str(known.get("name", config.get("name", folder.name))),
        arm=_label(str(known.get("arm") or config.get("arm") or ""), config),
        seed=int(number(known, "seed") or number(config, "seed") or 0),
        control=control,
        config=config,
        config_text=config_text,
        environment=environment or {},
        metrics=[row for _, row in metrics],
        evaluations=evaluations,
        summary=summary,
        verdict=_verdict(evaluations, [row for _, row in metrics], summary is not None),
        notes=notes,
    )


def number(row: Row, key: str) -> float | None:
    """A finite number of a row; None where it is absent, null, not finite or no number."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def json_lines(file: BinaryIO, name: Path, notes: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """JSON objects with their row numbers, from 1. A torn last line is left out and noted.

    A line is torn when it does not end in a newline and does not parse. Any other bad line: DataError.
    """
    for row, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            if line.endswith(b"\n"):
                raise DataError(f"expected a JSON object in UTF-8: {error}", file=name, row=row) from None
            _note(notes, f"{name.name}: the last line was half written and is left out")
            return
        if not isinstance(value, dict):
            raise DataError(f"expected a JSON object, got {type(value).__name__}", file=name, row=row)
        yield row, value


def rollout_rows(path: Path, notes: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Stream `rollouts.jsonl.zst`. A torn frame at the end is left out and noted; no file, no rows."""
    if not path.is_file():
        _note(notes, f"{path.name} is missing: there are no rollouts to show")
        return
    with path.open("rb") as raw:
        torn: list[str] = []
        source = _Frames(raw, torn)
        yield from json_lines(source, path, torn)  # type: ignore[arg-type]
        if torn:
            _note(notes, f"{path.name} ends in a half-written frame, which is left out")


class _Frames:
    """Lines of concatenated zstd frames; stops with a note where a frame is cut or damaged."""

    def __init__(self, raw: BinaryIO, torn: list[str]) -> None:
        self._raw, self._torn = raw, torn

    def __iter__(self) -> Iterator[bytes]:
        rest = b""
        for chunk in self._chunks():
            *lines, rest = (rest + chunk).split(b"\n")
            yield from (line + b"\n" for line in lines)
        if rest:
            yield rest

    def _chunks(self) -> Iterator[bytes]:
        decoder = zstandard.ZstdDecompressor().decompressobj()
        open_frame = False
        while data := self._raw.read(1 << 16):
            while data:
                try:
                    chunk = decoder.decompress(data)
                except zstandard.ZstdError as error:
                    self._torn.append(str(error))
                    return
                open_frame, data = not decoder.eof, decoder.unused_data
                if decoder.eof:
                    decoder = zstandard.ZstdDecompressor().decompressobj()
                yield chunk
        if open_frame:
            self._torn.append("ends inside a frame")


def _check_is_run(folder: Path) -> None:
    if not folder.is_dir():
        raise DataError("no such folder; expected a run folder", file=folder)
    if not (folder / "config.toml").is_file():
        raise DataError("not a run folder: config.toml is missing", file=folder)
    if not any((folder / name).is_file() for name in BESIDE_CONFIG):
        raise DataError(f"not a run folder: none of {', '.join(BESIDE_CONFIG)} is there", file=folder)


def _config(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        return text, tomllib.loads(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DataError(f"not readable as TOML: {error}", file=path) from None


def _json_object(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"expected a JSON object in UTF-8: {error}", file=path) from None
    if not isinstance(value, dict):
        raise DataError(f"expected a JSON object, got {type(value).__name__}", file=path)
    return value


def _by_step(path: Path, key: tuple[str, ...], notes: list[str]) -> list[tuple[int, dict[str, Any]]]:
    """Rows in order of step. A resumed run may have written a step twice: the later row counts."""
    if not path.is_file():
        notes.append(f"{path.name} is missing")
        return []
    rows: dict[tuple[Any, ...], tuple[int, dict[str, Any]]] = {}
    with path.open("rb") as file:
        for n, row in json_lines(file, path, notes):
            if number(row, "step") is None:
                raise DataError("expected a whole number", file=path, row=n, field="step")
            rows[tuple(str(row.get(field)) for field in key)] = n, row
    return sorted(rows.values(), key=lambda item: float(item[1]["step"]))


def _evaluation(folder: Path, n: int, row: Row) -> Evaluation:
    where = str(folder / "eval.jsonl")
    em = _estimate(row.get("em"), where, n, "em")
    if em is None:
        raise DataError("expected {value, low, high, n}", file=where, row=n, field="em")
    hops_table = row.get("by_hops") or {}
    if not isinstance(hops_table, Mapping):
        raise DataError("expected a table of estimates", file=where, row=n, field="by_hops")
    by_hops = {
        str(hops): part
        for hops, value in sorted(hops_table.items())
        if (part := _estimate(value, where, n, f"by_hops.{hops}")) is not None
    }
    return Evaluation(
        step=int(row["step"]),
        spent={key: value for key in SPENT.values() if (value := number(row, key)) is not None},
        set=str(row.get("set", "held-out")),
        em=em,
        f1=_estimate(row.get("f1"), where, n, "f1"),
        by_hops=by_hops,
        searches=number(row, "searches"),
        unanswered=number(row, "unanswered"),
        invalid=number(row, "invalid"),
        by_question=_by_question(row.get("em_by_question")),
    )


def _by_question(values: object) -> list[float]:
    good = isinstance(values, list) and all(isinstance(v, int | float) and math.isfinite(v) for v in values)
    return [float(v) for v in values] if good and isinstance(values, list) else []


def _estimate(value: object, file: str, row: int | None, field: str) -> Estimate | None:
    if value is None:
        return None
    point = number(value, "value") if isinstance(value, Mapping) else None
    if point is None or not isinstance(value, Mapping):
        raise DataError("expected {value, low, high, n}", file=file, row=row, field=field)
    n = number(value, "n")
    return Estimate(point, number(value, "low"), number(value, "high"), None if n is None else int(n))


def _label(name: str, config: Mapping[str, Any]) -> str:
    """A run's algorithm or ablation, by its name of today; without one, the algorithm that it was."""
    if not name:
        algorithm = config.get("algorithm")
        name = str(algorithm.get("name", "")) if isinstance(algorithm, Mapping) else ""
    if not name:
        method = config.get("method")
        name = str(algorithm_of(method if isinstance(method, Mapping) else {}, "config.toml", False)["name"])
    return ARMS.get(name, name)


def _verdict(evaluations: Sequence[Evaluation], metrics: Sequence[Row], finished: bool) -> Verdict:
    """`verdict.judge` of rows in which anything that is no number is left out."""
    steps = [{key: value for key in row if (value := number(row, key)) is not None} for row in metrics]
    held_out = [row for row in evaluations if row.set == "held-out"]
    paired = len({len(row.by_question) for row in held_out}) == 1
    rows = [{"em_by_question": row.by_question, "unanswered": row.unanswered} for row in held_out]
    return judge(rows if paired else [], steps, finished)


def _steps_done(summary: Row | None, metrics: Sequence[Row]) -> int:
    done = number(summary or {}, "steps")
    return int(done if done is not None else metrics[-1]["step"] if metrics else 0)


def _note(notes: list[str], text: str) -> None:
    if text not in notes:
        notes.append(text)
