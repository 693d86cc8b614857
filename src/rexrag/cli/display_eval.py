"""What `rexrag eval` draws: progress, scores, cost, differences, the published numbers, failures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress, TextColumn

from rexrag.cli.display import QUIET_SECONDS, format_interval, format_points, live_line, table
from rexrag.data.qa_sets import BENCHMARKS
from rexrag.evaluation.cells import Cell
from rexrag.io import printable
from rexrag.stats import differs

PUBLISHED_TITLES = {**{name: known.title for name, known in BENCHMARKS.items()}, "macro": "Avg"}


class EvalProgress:
    """An observer that draws: one live line on a terminal, a plain line now and then elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live: Progress | None = None
        self.task: Any = None
        self.total = self.done = self.answered = self.failed = 0
        self.right = 0.0
        self.cell: Cell | None = None
        self.start = self.last = time.monotonic()

    def started(self, total: int, cached: int) -> None:
        self.total, self.start = total, time.monotonic()
        if cached:
            self.console.print(f"{cached:,} answers are cached, {total:,} questions to ask")
        if total and self.console.is_terminal:
            self.live = live_line(
                self.console, MofNCompleteColumn(), TextColumn("{task.fields[note]}"), width=20
            )
            self.live.start()
            self.task = self.live.add_task("evaluating", total=total, note="loading")

    def auditing(self) -> None:
        self.stop()
        self.console.print("looking for the answers in the corpus …")

    def advanced(self, cell: Cell, rows: Sequence[dict[str, Any]]) -> None:
        if self.cell != cell:
            self.cell, self.right, self.answered = cell, 0.0, 0
        self.done += len(rows)
        self.failed += sum(bool(row["failure"]) for row in rows)
        self.answered += sum(not row["failure"] for row in rows)
        self.right += sum(row.get("em", 0.0) for row in rows)
        label = f"{cell.chosen.title} {cell.way}"
        note = f"EM {self.right / max(1, self.answered):.3f}" + (
            f"  failed {self.failed}" if self.failed else ""
        )
        if self.live is not None:
            self.live.update(self.task, description=_plain(label), completed=self.done, note=note)
        elif time.monotonic() - self.last > QUIET_SECONDS:
            self.last = time.monotonic()
            eta = (self.last - self.start) / self.done * (self.total - self.done)
            self.console.print(f"{self.done:,}/{self.total:,}  {_plain(label)}  {note}  eta {eta:.0f} s")

    def stop(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None


def print_evaluation(console: Console, result: dict[str, Any]) -> None:
    """All tables of an evaluation, in the order in which one reads them; each fits 80 columns."""
    ways = list(dict.fromkeys(cell["way"] for cell in result["cells"]))
    console.print(f"policy {_plain(result['policy']['name'])}")
    for way in ways:
        console.print(_scores(result, way))
        console.print(_costs(result, way))
    for pair in dict.fromkeys((row["way"], row["against"], row["other"]) for row in result["paired"]):
        console.print(_differences(result, pair))
    shown = "agent" if "agent" in ways else ways[0]
    if any(cell["set"] in BENCHMARKS for cell in result["cells"]):
        console.print(_published(result, shown))
        for line in _reasons(result, shown):
            console.print(f"  {_plain(line)}")
    anew = sum(cell.get("encoded_anew", 0) for cell in result["cells"])
    if anew:
        console.print(f"{anew:,} turns came as text and were encoded anew: not token-exact")
    _print_failures(console, result["failures"])
    console.print(f"figures {result['out']}/eval.json, one row a question in its cells/*/records.jsonl")


def _scores(result: dict[str, Any], way: str) -> Any:
    rows: list[tuple[str, ...]] = []
    cells = [cell for cell in result["cells"] if cell["way"] == way]
    for cell in cells:
        facts, corpus, recall = result["sets"][cell["set"]], cell["corpus"], cell["in_evidence"]
        sampled = facts["questions"] < facts["whole"]
        rows.append(
            (
                facts["title"],
                f"{cell['em']['n']}" + (f"/{facts['whole']}" if sampled else ""),
                format_interval(cell["em"]),
                _share(cell["se"]) if sampled else "–",
                _share(cell["f1"]["value"]),
                _share(cell["sub_em"]["value"]),
                _share(recall["value"]) if recall else "–",
                _share(corpus["ceiling"]) if corpus else "–",
            )
        )
    average = result["macro"][way]
    if len(cells) > 1 and average["em"]:
        others = [_share(average[name]["value"]) for name in ("f1", "sub_em")]
        rows.append(("average", f"{len(cells)} sets", format_interval(average["em"]), "–", *others, "–", "–"))
    columns = ("set", "n", "EM [95 %]", "SE", "F1", "sub-EM", "evidence", "ceiling")
    return table(f"{way}: scores", columns, rows, narrow=True)


def _costs(result: dict[str, Any], way: str) -> Any:
    rows = [
        (
            result["sets"][cell["set"]]["title"],
            f"{cell['searches']:.2f}",
            f"{cell['tokens']:.0f}",
            f"{cell['read']:.0f}",
            f"{cell['seconds']['p50']:.2f} / {cell['seconds']['p95']:.2f}",
            f"{100 * cell['unanswered']:.1f} %",
            f"{cell['invalid']:.2f}",
            cell["failed"],
        )
        for cell in result["cells"]
        if cell["way"] == way
    ]
    columns = ("set", "searches", "written", "read", "p50 / p95 s", "no answer", "invalid", "failed")
    return table(f"{way}: searches, tokens, seconds and invalid turns a question", columns, rows, narrow=True)


def _differences(result: dict[str, Any], pair: tuple[str, str, str]) -> Any:
    way, against, other = pair
    rows = []
    for row in result["paired"]:
        if (row["way"], row["against"], row["other"]) != pair:
            continue
        em = row["em"]
        star = " *" if differs(em) else ""
        known = result["sets"].get(row["set"])
        rows.append(
            (
                known["title"] if known else "average",
                em["n"] if "p" in em else f"{em['n']} sets",
                format_points(em) + star,
                f"{em['p']:.4f}" if "p" in em else "–",
                f"{em['better']} / {em['worse']}" if "better" in em else "–",
                f"{100 * row['f1']['value']:+.1f}",
            )
        )
    name = other if against == other else f"{other} of {against}"
    columns = ("set", "n", "EM in points [95 %]", "p", "+ / -", "F1 points")
    return table(
        f"{way} minus {name}, paired by question (*: interval without 0, p ≤ .05)", columns, rows, narrow=True
    )


def _published(result: dict[str, Any], way: str) -> Any:
    cells = {cell["set"]: cell for cell in result["cells"] if cell["way"] == way}
    average = result["macro"][way]["em"]
    ours = {name: _beside(cell["em"]["value"], cell["comparable"]) for name, cell in cells.items()}
    if cells.keys() >= BENCHMARKS.keys() and average:
        ours["macro"] = _beside(average["value"], all(cell["comparable"] for cell in cells.values()))
    rows = [
        (title, ours.get(name, "–"), *(f"{numbers[name]:.1f}" for numbers in result["published"].values()))
        for name, title in PUBLISHED_TITLES.items()
    ]
    names = (name.replace(" ", "\n", 1) for name in result["published"])
    columns = ("set", f"this\n{way}", *names)
    return table(
        "EM in percent beside published numbers (n/c: not comparable)",
        columns,
        rows,
        narrow=True,
    )


def _beside(value: float, comparable: bool) -> str:
    return f"{100 * value:.1f}" + ("" if comparable else " n/c")


def _reasons(result: dict[str, Any], way: str) -> list[str]:
    """Why numbers are not comparable, each reason once, with the sets it concerns."""
    where: dict[str, list[str]] = {}
    cells = [cell for cell in result["cells"] if cell["way"] == way]
    for cell in cells:
        for reason in cell["not_comparable_because"]:
            where.setdefault(reason, []).append(result["sets"][cell["set"]]["title"])
    if not where:
        return ["comparable: same questions, corpus, retriever and budget as published"]
    return [
        f"n/c, {'every set' if len(names) == len(cells) else ', '.join(names)}: {reason}"
        for reason, names in where.items()
    ]


def _plain(text: str) -> str:
    """Text of servers and files: no markup, no control characters."""
    return escape(printable(text))


def _share(value: float) -> str:
    return f"{value:.3f}".replace("0.", ".", 1) if value < 1 else f"{value:.3f}"


def _print_failures(console: Console, failures: dict[str, Any]) -> None:
    if not failures["failed"] and not failures["unasked"]:
        return
    console.print(
        f"{failures['failed']:,} of {failures['rows']:,} rows failed, {failures['unasked']:,} were not asked"
        + (f"; stopped after {_plain(failures['stopped'])}" if failures["stopped"] else "")
    )
    for reason, count in failures["reasons"].items():
        console.print(f"  {count:,} × {_plain(reason)}")
