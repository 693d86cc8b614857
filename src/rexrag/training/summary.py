"""`summary.json`: what a finished run reached, what it spent, and the verdict."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rexrag.config.schema import Config
from rexrag.io import write_json
from rexrag.training.verdict import judge, rise_of

HABITS = ("unanswered", "invalid", "searches")
"""Means over held-out questions beside EM: share without an answer, invalid turns, searches."""


def write_summary(config: Config, folder: Path, counts: Mapping[str, Any]) -> dict[str, Any]:
    """Write `summary.json` from the run folder's logs and return it.

    counts: steps, tokens, rollouts and seconds of the whole run, by their names in the logs. Figures of the
    first and of the last held-out evaluation end in `_before` and `_after`; `rise` is the paired difference.
    """
    rows = read_log(folder / "eval.jsonl")
    held_out = [row for row in rows if row["set"] == "held-out"]
    fresh = [row for row in rows if row["set"] != "held-out"]
    verdict = judge(held_out, read_log(folder / "metrics.jsonl"))
    summary: dict[str, Any] = {
        "verdict": verdict.as_json(),
        "name": config.name,
        "arm": config.label,
        "seed": config.seed,
        "steps": counts["step"],
        **counts,
    }
    for when, row in (("before", held_out[0]), ("after", held_out[-1])) if held_out else ():
        summary[f"em_{when}"] = row["em"]
        summary |= {f"{name}_{when}": row[name] for name in HABITS if name in row}
    if held_out:
        summary["rise"] = rise_of(held_out)
    if fresh:
        summary |= {"em_fresh_before": fresh[0]["em"], "em_fresh_after": fresh[-1]["em"]}
    write_json(folder / "summary.json", summary)
    return summary


def read_log(file: Path) -> list[dict[str, Any]]:
    """The rows of a log that is not compressed; none where there is no such file."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [json.loads(line) for line in lines]
