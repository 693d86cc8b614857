"""Plug-ins that are told of a run's events.

A callback is a function `(event, facts)`. Events, in order: "start" (config, folder), "evaluate" (a row of
`eval.jsonl`), "step" (a row of `metrics.jsonl`, and `done`, the share of the budget that is spent), "end"
(the summary). It must not change the facts. What it raises ends the run, with its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rexrag.config.schema import Config
from rexrag.plugins import calling, dotted_name, load_plugin

Callback = Callable[[str, Mapping[str, Any]], object]


class Observer(Protocol):
    """Told what happens; the command line draws a progress bar, trackers send numbers."""

    def started(self, config: Config, folder: Path) -> None: ...

    def evaluated(self, figures: dict[str, Any]) -> None: ...

    def stepped(self, row: dict[str, Any], done: float) -> None: ...


class Events:
    """Passes a run's events on to an observer and to callbacks. Raises PluginError for a callback's error."""

    def __init__(self, observer: Observer | None, callbacks: Sequence[Callback]) -> None:
        self.observer, self.callbacks = observer, callbacks

    def started(self, config: Config, folder: Path) -> None:
        if self.observer:
            self.observer.started(config, folder)
        self._tell("start", {"config": config, "folder": folder})

    def evaluated(self, figures: dict[str, Any]) -> None:
        if self.observer:
            self.observer.evaluated(figures)
        self._tell("evaluate", figures)

    def stepped(self, row: dict[str, Any], done: float) -> None:
        if self.observer:
            self.observer.stepped(row, done)
        self._tell("step", {**row, "done": done})

    def ended(self, summary: dict[str, Any]) -> None:
        self._tell("end", summary)

    def _tell(self, event: str, facts: Mapping[str, Any]) -> None:
        for callback in self.callbacks:
            calling(f"callback {dotted_name(callback)}, event '{event}'", callback, event, facts)


def load_callbacks(config: Config) -> list[Callback]:
    """`train.callbacks`. Raises PluginError."""
    return [load_plugin(name, "train.callbacks", parameters=2) for name in config.train.callbacks]
