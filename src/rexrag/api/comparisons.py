"""Comparing algorithms from Python: `compare`, and the `Comparison` that comes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rexrag.api.arguments import listed, naming_arguments, one_or_several
from rexrag.config import presets
from rexrag.config.schema import SPENT, Budget
from rexrag.errors import ConfigError
from rexrag.plugins import shown


@dataclass(frozen=True, slots=True, repr=False)
class Comparison:
    """A finished comparison. `figures` is what `compare.json` holds."""

    folder: Path
    figures: dict[str, Any]
    runs: tuple[Path, ...]

    def __repr__(self) -> str:
        return f"Comparison({str(self.folder)!r}, control={self.figures['control']!r})"

    def report(self, out: str | Path | None = None) -> Path:
        """Write the page (default: `report.html` in the folder) and return its path."""
        from rexrag.report import write_report

        page = Path(out) if out else self.folder / "report.html"
        return write_report(list(self.runs), page, self.figures["control"], self.figures)

    def difference(self, algorithm: str) -> dict[str, float]:
        """Held-out EM at the budget minus the control's, paired by seed: {value, low, high, n, p}."""
        arms = self.figures["arms"]
        if algorithm not in arms or algorithm == self.figures["control"]:
            others = ", ".join(name for name in arms if name != self.figures["control"])
            raise ConfigError(f"difference('{algorithm}'): expected one of {others}")
        return dict(arms[algorithm]["em_at_budget_difference"])

    def to_pandas(self) -> Any:
        """One row for each algorithm and seed. Needs pandas."""
        from rexrag.api.tables import data_frame

        rows = [
            {"algorithm": arm, "seed": seed, **{k: v for k, v in run.items() if isinstance(v, int | float)}}
            for arm, figures in self.figures["arms"].items()
            for seed, run in zip(self.figures["seeds"], figures["runs"], strict=True)
        ]
        return data_frame(rows)


def compare(
    algorithms: Sequence[str],
    config: str | Path = presets.QUICKSTART,
    *,
    seeds: int | Sequence[int] = 6,
    budget: tuple[Budget, float] = ("generated", 60_000),
    out: str | Path = "runs/compare",
    overrides: str | Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> Comparison:
    """Train every algorithm with every seed at the same budget and compare them in pairs.

    algorithms: names of algorithms or shipped ablations, or TOML files; the first is the control. seeds: how
    many, counted from 1, or which ones. budget: what is equal ("generated" tokens, "tokens" of any
    kind, "rollouts", "time" in seconds), and how much. out: folder; after a kill the same call continues.
    say: called with a line for each finished run. Raises ConfigError, RunFolderError.

    >>> rexrag.compare(["grpo", "rex-rag-distill"], seeds=6).report()    # doctest: +SKIP
    """
    from rexrag.experiments import runner

    names = listed(algorithms, "algorithms", "names")
    wanted = list(range(1, seeds + 1)) if isinstance(seeds, int) else listed(seeds, "seeds", "whole numbers")
    unit, amount = _checked_budget(budget)
    with naming_arguments(seeds="seeds", arms="algorithms", amount="budget"):
        work = runner.plan(str(config), names, wanted, unit, amount, one_or_several(overrides))
    figures = runner.run(work, Path(out), say=say)
    return Comparison(Path(out), figures, tuple(runner.run_folders(work, Path(out))))


def _checked_budget(budget: tuple[Budget, float]) -> tuple[Budget, float]:
    """(what, how much). Raises ConfigError."""
    right = isinstance(budget, tuple | list) and len(budget) == 2 and isinstance(budget[1], int | float)
    if not right or budget[0] not in SPENT:
        raise ConfigError(
            f"budget = {shown(budget)}: expected (NAME, amount), NAME one of {', '.join(SPENT)}"
        )
    return budget
