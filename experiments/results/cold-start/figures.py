"""Figures of a cold start: what `rexrag eval` wrote, as one line an evaluation and small records.

    python experiments/results/cold-start/figures.py NAME=EVALUATION_FOLDER …

Writes NAME.jsonl beside this file: one row a question that all of them were asked, without the traces.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rexrag.agent.protocols.tags import EVIDENCE_OPEN, NOTICE, parse_action
from rexrag.io import read_jsonl, write_jsonl
from rexrag.stats import score_interval

HERE = Path(__file__).parent
KEPT = ("group", "question", "answers", "answer", "em", "in_evidence", "searches", "invalid", "tokens")


def first_turn_is_valid(trace: str) -> bool:
    """Did the first turn hold a search or an answer?"""
    ends = [place for mark in (NOTICE, EVIDENCE_OPEN) if (place := trace.find(mark)) >= 0]
    return parse_action(trace[: min(ends, default=len(trace))]) is not None


def records(folder: str) -> dict[str, dict[str, Any]]:
    """The rows of an evaluation, by question."""
    (file,) = Path(folder).glob("cells/*/records.jsonl")
    rows = {}
    for _, row in read_jsonl(file):
        valid = first_turn_is_valid(row["trace"][0])
        rows[row["group"]] = {key: row[key] for key in KEPT} | {"first_turn_valid": valid}
    return rows


def main() -> None:
    evaluations = {name: records(folder) for name, _, folder in (a.partition("=") for a in sys.argv[1:])}
    common = set.intersection(
        *(set(rows) for rows in evaluations.values())
    )  # one may have been stopped early
    for name, found in evaluations.items():
        rows = [row for group, row in found.items() if group in common]
        write_jsonl(HERE / f"{name}.jsonl", rows)
        n = len(rows)
        figures = {
            "name": name,
            "n": n,
            "first_turn_valid": round(sum(row["first_turn_valid"] for row in rows) / n, 3),
            "unanswered": round(sum(row["answer"] is None for row in rows) / n, 3),
            "em": {key: round(value, 3) for key, value in score_interval([r["em"] for r in rows]).items()},
            "right_in_evidence": round(sum(bool(row["in_evidence"]) for row in rows) / n, 3),
            "searches": round(sum(row["searches"] for row in rows) / n, 2),
            "beijing": sum("beijing" in (row["answer"] or "").lower() for row in rows),
        }
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
