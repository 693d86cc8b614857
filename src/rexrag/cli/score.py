"""`rexrag score`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from rexrag.cli.training import JsonOption


def register(app: typer.Typer) -> None:
    app.command()(score)


def score(
    file: Annotated[Path, typer.Argument(help="Traces: rows with question, answers, response.")],
    rows: Annotated[bool, typer.Option("--rows", help="Also print one line a row.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Re-score traces made elsewhere: EM, F1, sub-EM, actions. Recorded scores are compared, not trusted.

    Example: rexrag score traces.jsonl --rows
    """
    from rexrag.cli.display import stdout, table
    from rexrag.evaluation.rescore import score_traces

    scores, totals = score_traces(file)
    if as_json:
        print(json.dumps({"totals": asdict(totals), "rows": [asdict(row) for row in scores]}))
        return
    console = stdout()
    if rows:
        columns = ("row", "EM", "F1", "sub-EM", "searches", "answers", "malformed", "prediction", "disagrees")
        lines = [
            (
                r.row, f"{r.em:.0f}", f"{r.f1:.2f}", f"{r.sub_em:.0f}", r.searches, r.answers, r.malformed,
                "–" if r.prediction is None else r.prediction[:40], ", ".join(r.disagrees) or "–",
            )
            for r in scores
        ]  # fmt: skip
        console.print(table(str(file), columns, lines))
    shown = {k: f"{v:.4f}" if isinstance(v, float) else v for k, v in asdict(totals).items()}
    console.print(table("Totals", ("figure", "value"), shown.items()))
