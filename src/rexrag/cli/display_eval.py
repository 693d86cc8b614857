"""What `rexrag eval` draws: progress, one table, why numbers are not comparable, failures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table

from rexrag.cli.display import QUIET_SECONDS, live_line, table
from rexrag.data.qa_sets import BENCHMARKS
from rexrag.evaluation.cells import Cell
from rexrag.io import printable
from rexrag.report.formatting import NONE, duration
from rexrag.stats import differs

WIDE = 4
"""With more columns than this, an interval takes two rows."""
AVERAGE = "macro"
"""The column of means over sets, under its name in `eval.json`."""


class EvalProgress:
    """An observer that draws: one live line on a terminal, a plain line now and then elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live: Progress | None = None
        self.task: Any = None
        self.total = self.done = self.scored = self.failed = 0
        self.right = 0.0
        self.cell: Cell | None = None
        self.start = self.last = time.monotonic()

    def started(self, total: int, cached: int) -> None:
        self.total, self.start = total, time.monotonic()
        if cached:
            self.console.print(f"{cached:,} answers are cached, {total:,} questions to ask")
        if total and self.console.is_terminal:
            self.live = live_line(self.console, MofNCompleteColumn(), note=True)
            self.live.start()
            self.task = self.live.add_task("evaluating", total=total, note="loading")

    def auditing(self) -> None:
        self.stop()
        self.console.print("looking for the answers in the corpus …")

    def answered(self, cell: Cell, row: dict[str, Any]) -> None:
        if self.cell != cell:
            self.cell, self.right, self.scored = cell, 0.0, 0
        self.done += 1
        self.failed += bool(row["failure"])
        self.scored += not row["failure"]
        self.right += row.get("em", 0.0)
        label = f"{cell.questions.title} {cell.system}"
        note = f"EM {100 * self.right / max(1, self.scored):.1f} %"
        note += f"  failed {self.failed}" if self.failed else ""
        if self.live is not None:
            self.live.update(self.task, description=_plain(label), completed=self.done, note=note)
        elif time.monotonic() - self.last > QUIET_SECONDS:
            self.last = time.monotonic()
            eta = (self.last - self.start) / self.done * (self.total - self.done)
            self.console.print(f"{self.done:,}/{self.total:,}  eta {duration(eta)}  {_plain(label)}  {note}")

    def stop(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None


def print_evaluation(console: Console, result: dict[str, Any]) -> None:
    """One table, then what has to be said about it."""
    console.print(f"policy {_plain(result['policy']['name'])}")
    drawn, legend = evaluation_table(result)
    console.print(drawn)
    for line in [*legend, *_reasons(result)]:
        console.print(_plain(line))
    anew = sum(cell.get("encoded_anew", 0) for cell in result["cells"])
    if anew:
        console.print(f"{anew:,} turns came as text and were encoded anew: not token-exact")
    _print_failures(console, result["failures"])
    console.print(f"figures {result['out']}/eval.json, one row a question in its cells/*/records.jsonl")


@dataclass(frozen=True, slots=True)
class _Column:
    """A column of the table: what it is called, its figures, and its paired differences by pair."""

    title: str
    name: str
    """The set's."""
    cell: Mapping[str, Any] | None
    average: Mapping[str, Any] | None
    facts: Mapping[str, Any]
    paired: Mapping[tuple[str, str], Mapping[str, Any]]


def evaluation_table(result: dict[str, Any]) -> tuple[Table, list[str]]:
    """Rows are measures. Columns are the sets and their average, or, of one set, the systems.

    Of several sets and several systems, a block of the main measures for each system. Returns the table and
    a line for each evaluation that it names by a number.
    """
    systems = list(dict.fromkeys(cell["system"] for cell in result["cells"]))
    by_set = len(result["sets"]) > 1
    blocks = {s: _set_columns(result, s) for s in systems} if by_set else {"": _system_columns(result)}
    outside = dict.fromkeys(
        (row["against"], row["other"]) for row in result["paired"] if row["against"] != row["other"]
    )
    numbers = {pair: i for i, pair in enumerate(outside, 1)}
    rows: list[tuple[str, ...]] = []
    for system, columns in blocks.items():
        several = len(blocks) > 1
        rows += [(system, *[""] * len(columns))] if several else []
        for label, cells in _rows(columns, numbers, main=several):
            rows.append((f"  {label}" if several else label, *cells))
    columns = next(iter(blocks.values()))
    rows += _published(result, columns)
    (facts, *_) = result["sets"].values()
    what = "" if by_set else f"{facts['title']}: "
    what += f"{systems[0]}, " if by_set and len(systems) == 1 else ""
    title = f"{what}scores in percent, tokens and seconds a question, 95 % intervals"
    title += ("\n*: interval of the paired difference without 0, and p ≤ .05") * bool(result["paired"])
    legend = [f"[{i}] {other} of {against}" for (against, other), i in numbers.items()]
    return table(title, ("", *(column.title for column in columns)), rows, narrow=True), legend


def _set_columns(result: dict[str, Any], system: str) -> list[_Column]:
    cells = {cell["set"]: cell for cell in result["cells"] if cell["system"] == system}
    columns = [
        _Column(facts["title"], name, cells.get(name), None, facts, _pairs(result, name, system))
        for name, facts in result["sets"].items()
    ]
    average = result["macro"][system]
    return [*columns, _Column("mean", AVERAGE, None, average, {}, _pairs(result, AVERAGE, system))]


def _system_columns(result: dict[str, Any]) -> list[_Column]:
    ((name, facts),) = result["sets"].items()
    return [
        _Column(c["system"], name, c, None, facts, _pairs(result, name, c["system"])) for c in result["cells"]
    ]


def _pairs(result: dict[str, Any], name: str, system: str) -> dict[tuple[str, str], Mapping[str, Any]]:
    return {
        (row["against"], row["other"]): row
        for row in result["paired"]
        if (row["set"], row["system"]) == (name, system)
    }


Measure = tuple[str, bool, Callable[[_Column], str]]
"""Its name, whether it is one of the main ones, and how a column shows it."""


def _figure(name: str, digits: int = 2, factor: float = 1.0) -> Callable[[_Column], str]:
    return lambda column: NONE if column.cell is None else f"{factor * column.cell[name]:.{digits}f}"


def _score(name: str) -> Callable[[_Column], str]:
    return lambda column: _percent(_value(column, name))


def _value(column: _Column, name: str) -> Mapping[str, float] | None:
    """A score with its interval, of a set or of the average; None where there is none."""
    found: Mapping[str, float] | None = (column.cell or column.average or {}).get(name)
    return found


def _sampled(column: _Column) -> bool:
    return column.cell is not None and column.facts["questions"] < column.facts["whole"]


def _count(column: _Column) -> str:
    if column.cell is None:
        return NONE
    return f"{column.cell['em']['n']:,}" + (f"/{column.facts['whole']:,}" if _sampled(column) else "")


def _seconds(percentile: str) -> Callable[[_Column], str]:
    return lambda column: NONE if column.cell is None else f"{column.cell['seconds'][percentile]:.2f}"


def _ceiling(column: _Column) -> str:
    corpus = column.cell and column.cell["corpus"]
    return f"{100 * corpus['ceiling']:.1f}" if corpus else NONE


def _judged(column: _Column) -> str:
    """The verdict of another judge than exact match."""
    em, correct = _value(column, "em"), _value(column, "correct")
    return NONE if em is None or correct is None or correct["value"] == em["value"] else _percent(correct)


def _failed(column: _Column) -> str:
    return f"{column.cell['failed']:,}" if column.cell and column.cell["failed"] else NONE


MEASURES: tuple[Measure, ...] = (
    ("questions", False, _count),
    ("EM", True, _score("em")),
    ("", True, lambda column: ""),
    ("correct", True, _judged),
    ("std. error", False, lambda c: f"{100 * c.cell['se']:.1f}" if c.cell and _sampled(c) else NONE),
    ("F1", True, _score("f1")),
    ("sub-EM", False, _score("sub_em")),
    ("evidence", False, _score("in_evidence")),
    ("ceiling", False, _ceiling),
    ("no answer", False, _figure("unanswered", 1, 100.0)),
    ("invalid", False, _figure("invalid")),
    ("searches", False, _figure("searches")),
    ("tokens out", True, _figure("tokens", 0)),
    ("tokens in", False, _figure("read", 0)),
    ("median s", False, _seconds("p50")),
    ("p95 s", False, _seconds("p95")),
    ("failed", True, _failed),
)
"""In the order of the table; the nameless one stands for the intervals of EM and for the differences."""


def _rows(
    columns: Sequence[_Column], numbers: Mapping[tuple[str, str], int], main: bool
) -> Iterator[tuple[str, list[str]]]:
    """Labels and cells of a block; rows in which nothing is known are left out."""
    for label, is_main, show in MEASURES:
        if main and not is_main:
            continue
        if not label:
            yield from _interval_rows([_value(column, "em") for column in columns])
            yield from _difference_rows(columns, numbers)
            continue
        cells = [show(column) for column in columns]
        if any(cell != NONE for cell in cells):
            yield label, cells


def _difference_rows(
    columns: Sequence[_Column], numbers: Mapping[tuple[str, str], int]
) -> Iterator[tuple[str, list[str]]]:
    for pair in dict.fromkeys(pair for column in columns for pair in column.paired):
        found = [column.paired[pair]["em"] if pair in column.paired else None for column in columns]
        name = f"minus [{numbers[pair]}]" if pair in numbers else f"minus {pair[1]}"
        yield name, [_percent(one, "+") + ("*" if one and differs(one) else "") for one in found]
        yield from _interval_rows(found, "+")


def _interval_rows(
    values: Sequence[Mapping[str, float] | None], sign: str = ""
) -> Iterator[tuple[str, list[str]]]:
    if len(values) > WIDE:
        for end in ("low", "high"):
            yield f"  {end}", [NONE if v is None else f"{100 * v[end]:{sign}.1f}" for v in values]
    else:
        ends = [
            NONE if v is None else f"{100 * v['low']:{sign}.1f}, {100 * v['high']:{sign}.1f}" for v in values
        ]
        yield "  95 %", ends


def _percent(value: Mapping[str, float] | None, sign: str = "") -> str:
    return NONE if value is None else f"{100 * value['value']:{sign}.1f}"


def _published(result: dict[str, Any], columns: Sequence[_Column]) -> list[tuple[str, ...]]:
    """The paper's EM, below the column of its set (of several systems, the agent's or else the first)."""
    if not _benchmarks(result):
        return []
    names = [column.name for column in columns]
    shown = next((i for i, column in enumerate(columns) if column.title == "agent"), 0)
    places = range(len(columns)) if len(set(names)) > 1 else [shown]
    rows = [("published", *[""] * len(columns))]
    for system, numbers in result["published"].items():
        cells = [f"{numbers[n]:.1f}" if n in numbers and i in places else NONE for i, n in enumerate(names)]
        rows.append((system, *cells))
    return rows


def _benchmarks(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in result["cells"] if cell["set"] in BENCHMARKS]


def _reasons(result: dict[str, Any]) -> list[str]:
    """Why numbers may not stand beside the published ones, each reason once, with the sets it concerns."""
    systems = [cell["system"] for cell in result["cells"]]
    system = "agent" if "agent" in systems else systems[0]
    cells = [cell for cell in _benchmarks(result) if cell["system"] == system]
    where: dict[str, list[str]] = {}
    for cell in cells:
        for reason in cell["not_comparable_because"]:
            where.setdefault(reason, []).append(result["sets"][cell["set"]]["title"])
    if cells and not where:
        return ["comparable with the published EM: same questions, corpus, retriever and budget"]
    return [
        f"not comparable, {'every set' if len(names) == len(cells) else ', '.join(names)}: {reason}"
        for reason, names in where.items()
    ]


def _plain(text: str) -> str:
    """Text of servers and files: no markup, no control characters."""
    return escape(printable(text))


def _print_failures(console: Console, failures: dict[str, Any]) -> None:
    if not failures["failed"] and not failures["unasked"]:
        return
    console.print(
        f"{failures['failed']:,} of {failures['rows']:,} rows failed, {failures['unasked']:,} were not asked"
        + (f"; stopped after {_plain(failures['stopped'])}" if failures["stopped"] else "")
    )
    for reason, count in failures["reasons"].items():
        console.print(f"  {count:,} × {_plain(reason)}")
