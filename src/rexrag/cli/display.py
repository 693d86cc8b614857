"""What the command line draws: progress while a run goes on, and tables."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from rich.table import Column, Table

from rexrag.config.schema import Config
from rexrag.experiments.analysis import DIAGNOSTIC_NAMES, MEASURES, budget_name
from rexrag.io import printable
from rexrag.report.formatting import NONE, duration
from rexrag.stats import differs
from rexrag.training.verdict import dropped_line

QUIET_SECONDS = 10.0
"""Where the output is no terminal, a line of progress this often."""

SPEED_SECONDS = 3600.0
"""The time to go is estimated from this much of the past: a step of a large model takes minutes."""


def live_line(console: Console, *columns: ProgressColumn, width: int = 10, note: bool = False) -> Progress:
    """A live line: what, a bar, `columns`, the time so far, the time to go; then the field `note`.

    A line too long for the terminal loses the end of its label and of its note, never the times.
    """
    last = [TextColumn("{task.fields[note]}", table_column=_cropped(ratio=1))] if note else []
    return Progress(
        TextColumn("[bold]{task.description}", table_column=_cropped(max_width=20)),
        BarColumn(bar_width=width, table_column=Column(width=width)),
        *columns,
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        *last,
        console=console,
        expand=note,
        speed_estimate_period=SPEED_SECONDS,
    )


def _cropped(**layout: int) -> Column:
    return Column(no_wrap=True, overflow="ellipsis", **layout)  # type: ignore[arg-type]


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
        self.live = live_line(self.console, TextColumn("{task.percentage:3.0f}%"), note=True)
        self.live.start()
        self.task = self.live.add_task(self.label, total=1.0, note="first evaluation")

    def evaluated(self, figures: dict[str, Any]) -> None:
        em = figures["em"]
        where = f"after step {figures['step']}" if figures["step"] else "before training"
        said = f"{self.label}: {figures['set']} EM {format_interval(em)} % {where}, n = {em['n']}"
        if figures.get("unanswered"):
            said += f", no answer {100 * figures['unanswered']:.1f} %"
        self.console.print(said)

    def stepped(self, row: dict[str, Any], done: float) -> None:
        done = min(1.0, done)
        if dropped := dropped_line(row):
            self.console.print(f"{self.label}: {dropped}")
        note = step_note(row)
        if self.live is not None:
            self.live.update(self.task, completed=done, note=note)
            if done >= 1.0:
                self.stop()
        elif time.monotonic() - self.last > QUIET_SECONDS:
            self.last = time.monotonic()
            eta = row["seconds"] * (1.0 - done) / done
            self.console.print(f"{self.label}: {100 * done:.0f}%  eta {duration(eta)}  {note}")

    def stop(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None


def step_note(row: Mapping[str, Any]) -> str:
    """A step in a few figures, the most telling first; shares are percentages."""
    speed = row["generated_tokens"] / max(1e-9, row["seconds"])
    probes = (
        f"  probes kept {row['probes/kept']:.0f} of {row['probes/drawn']:.0f}" if row["probes/drawn"] else ""
    )
    silent = row.get("dead_ends/unanswered")
    no_answer = f"  no answer {100 * silent:.0f} %" if silent else ""
    return (
        f"step {row['step']}  EM {100 * row['em/train']:.0f} %{no_answer}  "
        f"dead ends {100 * row['dead_ends/rate']:.0f} %{probes}  {speed:,.0f} tok/s"
    )


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
            self.console.print(f"{self.LABELS[stage]}: {done:,}/{total:,}  eta {duration(eta)}")

    def _finish_last(self) -> None:
        """The stage before is done: its total may have been an estimate, and its last call was not drawn."""
        if self.live is not None and self.tasks:
            task = list(self.tasks.values())[-1]
            self.live.update(task, completed=self.heard, total=self.heard)


def format_interval(value: Mapping[str, float]) -> str:
    """A share in percent, `41.2 [35.6, 46.8]`; without an interval where there is no spread."""
    return _with_ends(value, "")


def format_points(value: Mapping[str, float]) -> str:
    """A difference in points, `+35.1 [+29.1, +41.1]`; without an interval where there is no spread."""
    return _with_ends(value, "+")


def _with_ends(value: Mapping[str, float], sign: str) -> str:
    shown = f"{100 * value['value']:{sign}.1f}"
    if value["low"] < value["high"]:
        shown += f" [{100 * value['low']:{sign}.1f}, {100 * value['high']:{sign}.1f}]"
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
    """Runs side by side, in 80 columns: a row a measure, a column a run."""
    rows = [
        (name, *(_or_none(say, summary) for _, summary in summaries))
        for name, say in SUMMARY_MEASURES.items()
    ]
    title = "Held-out questions, 95 % intervals; before → after training"
    return table(title, ("", *(label for label, _ in summaries)), rows, narrow=True)


def _or_none(say: Callable[[dict[str, Any]], str], summary: dict[str, Any]) -> str:
    try:
        return say(summary)
    except (KeyError, TypeError):  # not measured in this run
        return NONE


def _change(name: str, factor: float, digits: int) -> Callable[[dict[str, Any]], str]:
    return lambda s: " → ".join(f"{factor * s[f'{name}_{when}']:.{digits}f}" for when in ("before", "after"))


SUMMARY_MEASURES: dict[str, Callable[[dict[str, Any]], str]] = {
    "EM before, %": lambda s: format_interval(s["em_before"]),
    "EM after, %": lambda s: format_interval(s["em_after"]),
    "rise, points": lambda s: format_points(s["rise"]),
    "no answer, %": _change("unanswered", 100.0, 1),
    "invalid turns a question": _change("invalid", 1.0, 2),
    "searches a question": _change("searches", 1.0, 2),
    "steps": lambda s: f"{s['steps']:,}",
    "generated tokens": lambda s: f"{s['generated_tokens']:,}",
    "time": lambda s: duration(s["seconds"]),
}
"""Rows of the result of `rexrag train`: name -> what stands there of a run's `summary.json`."""
STACKED = 3
"""From this many arms on, an interval stands under its value."""


def comparison_table(result: dict[str, Any]) -> Table:
    """A row a measure, a column an arm; under each EM its paired difference to the control."""
    arms = result["arms"]
    stacked = len(arms) >= STACKED

    def cells(name: str, say: Callable[[Mapping[str, float]], str], missing: str) -> list[str]:
        texts = [say(figures[name]) if name in figures else missing for figures in arms.values()]
        return [text.replace(" [", "\n[") if stacked else text for text in texts]

    rows: list[tuple[str, ...]] = []
    for name, title in MEASURES.items():
        if not any(name in figures for figures in arms.values()):
            continue
        rows.append((f"{title}, %", *cells(name, format_interval, NONE)))
        if any(f"{name}_difference" in figures for figures in arms.values()):
            gaps = cells(f"{name}_difference", _gap, "")
            rows.append((f"  minus {result['control']}", *gaps))
    for name, title in DIAGNOSTIC_NAMES.items():
        found = [figures["diagnostics"].get(name) for figures in arms.values()]
        if any(value is not None for value in found):
            rows.append((f"{title}, %", *(NONE if v is None else f"{100 * v:.0f}" for v in found)))
    for title, say in SPENT_MEASURES.items():
        rows.append((title, *(say(figures) for figures in arms.values())))
    title = f"Held-out EM, {len(result['seeds'])} seeds, budget {budget_name(result)}; 95 % intervals"
    title += f"\nminus {result['control']}: paired by seed, in points; *: significantly different from 0"
    return table(title, ("mean over seeds", *arms), rows, narrow=True)


SPENT_MEASURES: dict[str, Callable[[dict[str, Any]], str]] = {
    "searches a rollout": lambda f: f"{f['diagnostics'].get('searches/mean', 0.0):.2f}",
    "steps": lambda f: f"{f['steps']:,.0f}",
    "rollouts": lambda f: f"{f['rollouts']:,.0f}",
    "generated tokens": lambda f: f"{f['generated_tokens']:,.0f}",
    "time of a run": lambda f: duration(f["seconds"]),
}


def _gap(gap: Mapping[str, float]) -> str:
    value, space, ends = format_points(gap).partition(" ")
    return f"{value}{'*' if differs(gap) else ''}{space}{ends}"


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
