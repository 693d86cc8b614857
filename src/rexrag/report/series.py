"""Numbers over runs: which runs are seeds of one arm, and curves over seeds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from rexrag.report.read import Evaluation, Run, number

Points = list[tuple[float, float]]

ARM_COLORS = ("--arm0", "--arm1", "--arm2", "--arm3", "--arm4", "--arm5")
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "x")
CONTROL_STYLE = ("--control", "circle-open")


@dataclass(frozen=True, slots=True)
class Arm:
    """An algorithm or ablation: runs that differ by seed only, and how they are drawn."""

    name: str
    color: str
    symbol: str
    runs: Sequence[Run]

    @property
    def is_control(self) -> bool:
        return (self.color, self.symbol) == CONTROL_STYLE


def group_arms(runs: Sequence[Run], baseline: str = "grpo") -> list[Arm]:
    """Runs by arm, in order of appearance; runs of one arm differ by seed alone.

    Kept apart: a control with the same name as its run's arm, and runs of an arm under other settings.
    baseline: the arm that others are compared with, where several were trained.
    """
    trained = {run.arm for run in runs if not run.control}
    members: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        owner = next((r.arm for r in runs if not r.control and r.folder == run.folder.parent), None)
        twin = run.control and run.arm == owner
        members.setdefault((f"{run.arm} (control)" if twin else run.arm, _settings(run)), []).append(run)
    colors = iter([c for _ in members for c in zip(ARM_COLORS, SYMBOLS, strict=True)])
    arms: list[Arm] = []
    for (name, _), group in members.items():
        control = any(run.control for run in group) or (name == baseline and len(trained) > 1)
        color, symbol = CONTROL_STYLE if control else next(colors)
        earlier = sum(arm.name.partition(" · ")[0] == name for arm in arms)
        arms.append(Arm(f"{name} · settings {earlier + 1}" if earlier else name, color, symbol, group))
    return arms


def _settings(run: Run) -> str:
    """What runs of one arm share; a seed may generate a world of its own."""
    data = dict(run.config.get("data", {}))
    if not data.get("train"):
        data.pop("world_seed", None)
    sections = {
        name: run.config.get(name)
        for name in ("policy", "retriever", "agent", "algorithm", "method", "learner")
    }
    questions = run.config.get("train", {}).get("questions")
    return json.dumps([data, sections, questions], sort_keys=True, default=str)


def series(run: Run, key: str, x: str = "step") -> Points:
    """(x, metric) of every step that has both."""
    pairs = ((number(row, x), number(row, key)) for row in run.metrics)
    return [(at, value) for at, value in pairs if at is not None and value is not None]


def mean_series(runs: Sequence[Run], key: str, width: int, x: str = "step") -> Points:
    """Mean over the seeds at steps that all have, then a trailing moving average over `width` steps."""
    tables = [table for run in runs if (table := _table(run, key, x))]
    if not tables:
        return []
    steps = sorted(set(tables[0]).intersection(*tables[1:]))
    points = [tuple(map(fmean, zip(*(table[step] for table in tables), strict=True))) for step in steps]
    smooth = [fmean(value for _, value in points[max(0, i - width + 1) : i + 1]) for i in range(len(points))]
    return [(at, value) for (at, _), value in zip(points, smooth, strict=True)]


def _table(run: Run, key: str, x: str) -> dict[float, tuple[float, float]]:
    values = ((row["step"], number(row, x), number(row, key)) for row in run.metrics)
    return {step: (at, value) for step, at, value in values if at is not None and value is not None}


def aligned(seeds: Sequence[Sequence[Evaluation]], curves: Sequence[Points]) -> list[Points]:
    """For each evaluation that the seeds share, the (spent, EM) of every seed.

    Seeds evaluated at the same steps are paired by step. Otherwise (a budget of tokens ends each seed at
    another step) every curve is interpolated linearly at the points of the curve with the fewest rows.
    """
    if all([row.step for row in rows] == [row.step for row in seeds[0]] for rows in seeds):
        return [list(column) for column in zip(*curves, strict=True)]
    first, last = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
    grid = [at for at, _ in min(curves, key=len) if first <= at < last] + [last] * (last >= first)
    return [[(at, _interpolated(curve, at)) for curve in curves] for at in grid]


def _interpolated(curve: Points, at: float) -> float:
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x0 <= at <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (at - x0) / (x1 - x0)
    return curve[-1][1]
