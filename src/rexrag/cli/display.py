"""What the command line draws: progress while a run goes on, and tables."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from rexrag.config.schema import Config
from rexrag.io import printable
from rexrag.stats import differs

QUIET_SECONDS = 10.0
"""Where the output is no terminal, a line of progress this often."""


def live_line(console: Console, *columns: ProgressColumn, width: int = 24) -> Progress:
    """A live line: what, a bar, `columns`, the time so far and the time to go."""
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=width),
        *columns,
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        console=console,
    )


class RunProgress:
    """An `Observer` that draws: one live line on a terminal, a plain line now and then elsewhere."""

    def __init__(self, console: Console, label: str) -> None:
        self.console, self.label = console, escape(printable(label))
        self.live: Progress | None = None
        self.task: Any = None
        self.last = time.monotonic()

    def started(self, config: Config, folder: Path) -> None:
        if not self.console.is_terminal:
            return
        self.live = live_line(
            self.console, TextColumn("{task.percentage:3.0f}%"), TextColumn("{task.fields[note]}")
        )
        self.live.start()
        self.task = self.live.add_task(self.label, total=1.0, note="evaluating the start")

    def evaluated(self, figures: dict[str, Any]) -> None:
        em = figures["em"]
        where = f"after step {figures['step']}" if figures["step"] else "before training"
        self.console.print(f"{self.label}: {figures['set']} EM {format_interval(em)} {where}, n = {em['n']}")

    def stepped(self, row: dict[str, Any], done: float) -> None:
        done = min(1.0, done)
        speed = row["generated_tokens"] / max(1e-9, row["seconds"])
        note = (
            f"step {row['step']}  EM {row['em/train']:.2f}  dead ends {row['dead_ends/rate']:.2f}  "
            f"probes {row['probes/kept']:.0f}/{row['probes/drawn']:.0f}  {speed:,.0f} tok/s"
        )
        if self.live is not None:
            self.live.update(self.task, completed=done, note=note)
            if done >= 1.0:
                self.stop()
        elif time.monotonic() - self.last > QUIET_SECONDS:
            self.last = time.monotonic()
            eta = row["seconds"] * (1.0 - done) / done
            self.console.print(f"{self.label}: {100 * done:.0f}%  {note}  eta {eta:.0f} s")

    def stop(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None


class BuildProgress:
    """How far an index build is: one live line a stage on a terminal, a plain line now and then elsewhere."""

    LABELS: ClassVar = {
        "documents": "copy passages",
        "words": "index words",
        "vectors": "encode passages",
        "ann": "index vectors",
        "checking": "check files",
    }
    DRAWN_SECONDS = 0.1
    """A call a passage comes in; drawing them all would cost as much as indexing."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live: Progress | None = None
        self.tasks: dict[str, Any] = {}
        self.begun: dict[str, tuple[float, int]] = {}
        self.drawn, self.heard = 0.0, 0
        self.last = time.monotonic()

    def __enter__(self) -> BuildProgress:
        if self.console.is_terminal:
            self.live = live_line(self.console, TextColumn("{task.completed:,.0f}/{task.total:,.0f}"))
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live is not None:
            self.live.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        total = max(total, done)
        # From what the first call found: a resumed stage does not begin at 0.
        start, first = self.begun.setdefault(stage, (now, done))
        if self.live is not None:
            if stage not in self.tasks:
                self._finish_last()
                self.tasks[stage] = self.live.add_task(self.LABELS[stage], total=total)
            self.heard = done
            if now - self.drawn < self.DRAWN_SECONDS and done < total:
                return
            self.drawn = now
            self.live.update(self.tasks[stage], completed=done, total=total)
        elif now - self.last > QUIET_SECONDS and done > first:
            self.last = now
            eta = (now - start) * (total - done) / (done - first)
            self.console.print(f"{self.LABELS[stage]}: {done:,}/{total:,}  eta {eta:.0f} s")

    def _finish_last(self) -> None:
        """The stage before is done: its total may have been an estimate, and its last call was not drawn."""
        if self.live is not None and self.tasks:
            task = list(self.tasks.values())[-1]
            self.live.update(task, completed=self.heard, total=self.heard)


def format_interval(value: dict[str, float]) -> str:
    """`.412 [.356, .468]`; without an interval where there is no spread."""
    shown = f"{value['value']:.3f}"
    if value["low"] < value["high"]:
        shown += f" [{value['low']:.3f}, {value['high']:.3f}]"
    return shown.replace("0.", ".")


def format_points(value: dict[str, float]) -> str:
    """`+35.1 [+29.1, +41.1]`; without an interval where there is no spread."""
    shown = f"{100 * value['value']:+.1f}"
    if value["low"] < value["high"]:
        shown += f" [{100 * value['low']:+.1f}, {100 * value['high']:+.1f}]"
    return shown


def table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    words: bool = False,
    narrow: bool = False,
) -> Table:
    """A plain table; text from models and files is escaped. `words`: every column is text, not numbers.

    `narrow` leaves one space between columns, so that more of them fit a terminal.
    """
    padding = (0, 1, 0, 0) if narrow else (0, 1)
    drawn = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False,
        padding=padding,
    )  # fmt: skip
    for i, column in enumerate(columns):
        drawn.add_column(column, justify="left" if words or i == 0 else "right", overflow="fold")
    for row in rows:
        drawn.add_row(*(escape(printable(str(cell))) for cell in row))
    return drawn


def summary_table(summaries: Sequence[tuple[str, dict[str, Any]]]) -> Table:
    """Runs side by side, in 80 columns."""
    rows = []
    for label, summary in summaries:
        has_eval = "em_before" in summary
        rows.append(
            (
                label,
                format_interval(summary["em_before"]) if has_eval else "–",
                format_interval(summary["em_after"]) if has_eval else "–",
                format_points(summary["rise"]) if has_eval else "–",
            )
        )
    columns = ("run", "EM before", "EM after", "rise in points")
    return table("Held-out exact match with 95 % bootstrap intervals", columns, rows, narrow=True)


MEASURES = {
    "em_at_budget": "at budget",
    "em_half": "half way",
    "area": "curve",
    "em": "end",
    "em_fresh": "fresh world",
    **{f"em_{n}_hop": f"{n} hop" for n in range(1, 5)},
}
"""Figures of a comparison, in the order of its table; `curve` is the mean under it over the budget.

"At budget" is read off the curve; the end, and what else is of it, is as far past it as the last step went.
"""


def comparison_table(result: dict[str, Any]) -> Table:
    """Arms with their paired difference to the control; a star where `intervals.differs`."""
    rows: list[tuple[str, ...]] = []
    for arm, figures in result["arms"].items():
        rows.append((arm, "", "", ""))
        for name in (name for name in MEASURES if name in figures):
            gap = figures.get(f"{name}_difference")
            star = "*" if gap and differs(gap) else ""
            rows.append(
                (
                    f"  {MEASURES[name]}",
                    format_interval(figures[name]),
                    format_points(gap) + star if gap else "",
                    f"{gap['p']:.3f}" if gap else "",
                )
            )
    n = len(result["seeds"])
    budget = f"{result['amount']:g} {result['budget']}"
    title = f"Held-out EM at {budget}, {n} seeds"
    title += f"\nPoints above {result['control']}; *: interval without 0 and p ≤ .05"
    return table(title, ("arm", "EM", "difference", "p"), rows, narrow=True)


def diagnostics_table(result: dict[str, Any]) -> Table:
    """What happened on the way, as means over steps and seeds."""
    columns = {
        "dead": "dead_ends/rate",
        "wrong": "groups/all_wrong_before",
        "after": "groups/all_wrong_after",
        "right": "probes/success",
        "kept": "probes/kept_share",
        "ESS": "ess",
        "search": "searches/mean",
        "KL": "kl_to_start",
    }
    rows = []
    for arm, figures in result["arms"].items():
        found = figures["diagnostics"]
        rows.append([arm, *(f"{found[name]:.2f}" if name in found else "–" for name in columns.values())])
    return table(
        "On the way: dead ends; groups all wrong, before and after probes; probes right and kept",
        ("arm", *columns),
        rows,
        narrow=True,
    )


def dry_run_tables(facts: dict[str, Any]) -> Iterable[Table | str]:
    """What `rexrag train --dry-run` found: verl's keys, memory, and what stands in the way."""
    keys = [(key, json.dumps(value)) for key, value in sorted(facts["verl"].items())]
    yield table("What rexrag sets in verl's configuration", ("key", "value"), keys, words=True)
    memory = [(name, f"{value:.1f}") for name, value in facts["memory_gib"].items()]
    yield table("Memory of one GPU, estimated", ("part", "GiB"), memory)
    for note in facts["notes"]:
        yield escape(note)


def stdout() -> Console:
    return Console(highlight=False, soft_wrap=not sys.stdout.isatty())
