"""Evaluating from Python: `evaluate`, and the `Evaluation` that comes out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rexrag.api.agents import Agent, load_agent
from rexrag.api.arguments import naming_arguments, one_or_several
from rexrag.evaluation.cells import Choices, plan_evaluation
from rexrag.evaluation.runner import Options, run


@dataclass(frozen=True, slots=True, repr=False)
class Evaluation:
    """A finished evaluation. `figures` is what `eval.json` holds."""

    folder: Path
    figures: dict[str, Any]

    def __repr__(self) -> str:
        return f"Evaluation({str(self.folder)!r})"

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One row for each question and strategy: answer, scores, searches, tokens."""
        found = []
        for file in sorted((self.folder / "cells").glob("*/records.jsonl")):
            settings = json.loads((file.parent / "settings.json").read_text(encoding="utf-8"))
            with file.open(encoding="utf-8") as lines:
                found += [{"strategy": settings["strategy"], **json.loads(line)} for line in lines]
        return found

    def em(self, strategy: str = "agent") -> dict[str, float]:
        """Exact match of a strategy over all sets: {value, low, high, n}, fractions. Raises KeyError."""
        cells = [cell for cell in self.figures["cells"] if cell["system"] == strategy]
        if len(cells) == 1:
            return dict(cells[0]["em"])
        return dict(self.figures["macro"][strategy]["em"])

    def to_pandas(self) -> Any:
        """`rows` as a table. Needs pandas."""
        from rexrag.api.tables import data_frame

        return data_frame(self.rows)


def evaluate(
    agent: Agent | str | Path,
    questions: str | Path | Sequence[str] = (),
    *,
    strategies: str | Sequence[str] = ("agent",),
    votes: int = 1,
    limit: int = 0,
    out: str | Path = "runs/eval/python",
) -> Evaluation:
    """Score an agent and baselines on questions; the same as `rexrag eval`.

    agent: an `Agent`, or whatever `load_agent` takes. questions: one or several files; none takes the run's
    own held-out questions. strategies: "agent", "reflect", "direct", "rag", … limit: questions of each set,
    0 for all. out: folder; questions with an answer there are not asked again. Raises RexragError with one
    line.

    >>> rexrag.evaluate(agent, "dev.jsonl", strategies=["agent", "reflect"]).em()      # doctest: +SKIP
    """
    loaded = agent if isinstance(agent, Agent) else load_agent(agent)
    files = [str(questions)] if isinstance(questions, str | Path) else [str(f) for f in questions]
    choices = Choices(data=files, strategies=tuple(one_or_several(strategies)), votes=votes, limit=limit)
    with naming_arguments(strategy="strategies", votes="votes", data="questions"):
        plan = plan_evaluation(
            loaded.parts.source, loaded.config, choices, Path(out), loaded.parts.given_retriever
        )
    return Evaluation(Path(out), run(plan, Options()))
