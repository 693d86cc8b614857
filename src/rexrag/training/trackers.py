"""Optional loggers, as observers of a run: TensorBoard, Weights & Biases, Trackio.

They get the numbers of `metrics.jsonl` and `eval.jsonl`. Hosted ones also get the configuration, with the
paths and addresses in it. No text of questions, documents or models leaves the run folder.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rexrag.config.schema import Config, Tracker
from rexrag.errors import ConfigError
from rexrag.training.callbacks import Observer

PACKAGES: Mapping[Tracker, str] = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}
PROJECT = "rexrag"
CONTROL = "control"
"""Name of the control's run folder, inside the run's own."""


class Together:
    """Several observers as one."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self.observers = observers

    def started(self, config: Config, folder: Path) -> None:
        for observer in self.observers:
            observer.started(config, folder)

    def evaluated(self, figures: dict[str, Any]) -> None:
        for observer in self.observers:
            observer.evaluated(figures)

    def stepped(self, row: dict[str, Any], done: float) -> None:
        for observer in self.observers:
            observer.stepped(row, done)

    def finish(self) -> None:
        """Close every logger, which sends what it still holds; call it when the run is over or stopped."""
        for observer in self.observers:
            if isinstance(observer, TensorBoard | Hosted):
                observer.finish()


class TensorBoard:
    """Event files in the run folder's `tensorboard/`."""

    def __init__(self) -> None:
        self.module = _package("tensorboard", "torch.utils.tensorboard")
        self.writer: Any = None

    def started(self, config: Config, folder: Path) -> None:
        self.writer = self.module.SummaryWriter(str(folder / "tensorboard"))

    def evaluated(self, figures: dict[str, Any]) -> None:
        self._write(evaluation(figures), figures["step"])

    def stepped(self, row: dict[str, Any], done: float) -> None:
        self._write(numbers(row), row["step"])

    def finish(self) -> None:
        if self.writer is not None:
            self.writer.close()

    def _write(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()


class Hosted:
    """wandb, or trackio, which has the same functions. Their own configuration says where they send to."""

    def __init__(self, name: Tracker) -> None:
        self.module = _package(name, name)
        self.open = False

    def started(self, config: Config, folder: Path) -> None:
        name = folder.name if folder.name != CONTROL else f"{folder.parent.name}-{CONTROL}"
        self.module.init(project=PROJECT, name=name, config=config.model_dump(mode="json"))
        self.open = True

    def evaluated(self, figures: dict[str, Any]) -> None:
        self.module.log(evaluation(figures), step=figures["step"])

    def stepped(self, row: dict[str, Any], done: float) -> None:
        self.module.log(numbers(row), step=row["step"])

    def finish(self) -> None:
        if self.open:  # trackio raises where `init` was not called
            self.module.finish()


def open_trackers(names: Sequence[Tracker]) -> list[Observer]:
    """One observer for each name. Raises ConfigError with the command that installs a missing package."""
    return [TensorBoard() if name == "tensorboard" else Hosted(name) for name in names]


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in a row of `metrics.jsonl`, without the step."""
    return {name: float(v) for name, v in row.items() if isinstance(v, int | float) and name != "step"}


def evaluation(figures: Mapping[str, Any]) -> dict[str, float]:
    """`held-out/em`, `held-out/em_2_hop`, `held-out/f1` … of an evaluation."""
    where = figures["set"]
    values = {f"{where}/em": figures["em"]["value"]}
    values |= {f"{where}/em_{hops}_hop": em["value"] for hops, em in figures.get("by_hops", {}).items()}
    for name in ("f1", "searches", "unanswered", "invalid", "tokens"):
        value = figures.get(name)
        if value is not None:
            values[f"{where}/{name}"] = float(value["value"] if isinstance(value, Mapping) else value)
    return values


def _package(name: Tracker, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(
            f"train.track: '{name}' is not installed; pip install {PACKAGES[name]}, or -e '.[track]'"
        ) from None
