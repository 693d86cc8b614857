"""A cell's rows on disk: one JSON object a question, appended as it is answered, read again after a kill."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rexrag.agent.reward import evidence_answers, has_answer
from rexrag.agent.scoring import Scoring
from rexrag.data.qa_sets import QuestionSet
from rexrag.errors import DataError
from rexrag.evaluation.attempt import Attempt
from rexrag.evaluation.corpus_audit import Audit
from rexrag.evaluation.strategies import CLOSED_BOOK
from rexrag.io import json_line
from rexrag.stats import sampled_error, score_interval
from rexrag.training.validation import Scored, figures, mean, scored
from rexrag.types import Question

Records = dict[str, dict[str, Any]]
"""The newest row of each question, by group."""
FILE = "records.jsonl"
SYNC_SECONDS = 1.0
"""A power cut loses the rows of this time at most; a kill loses none."""


def record(attempt: Attempt, strategy: str, scoring: Scoring | None = None) -> dict[str, Any]:
    """One row: question, answer, scores, evidence, costs. A failed row has no scores.

    scoring: judges the answer; exact match where there is none. Raises PluginError.
    """
    question = attempt.question
    judged = strategy not in CLOSED_BOOK and bool(evidence_answers(question.answers))
    row: dict[str, Any] = {
        "group": question.group,
        "question": question.text,
        "answers": list(question.answers),
        "failure": attempt.failure,
        "answer": attempt.answer,
    }
    if not attempt.failure:
        found = scored(question, attempt.answer, attempt.searches, attempt.tokens, attempt.invalid)
        judge = scoring or Scoring()
        correct = attempt.answer is not None and judge.judged(attempt.answer, question)
        row |= {"em": found.em, "correct": correct, "f1": found.f1, "sub_em": found.sub_em}
    row |= {
        "in_evidence": any(has_answer(d.contents, question.answers) for d in attempt.documents)
        if judged
        else None,
        "searches": attempt.searches,
        "tokens": attempt.tokens,
        "read": attempt.read,
        "invalid": attempt.invalid,
        "encoded_anew": attempt.encoded_anew,
        "seconds": round(attempt.seconds, 4),
        "stop": attempt.stop,
        "documents": [document.id for document in attempt.documents],
        "trace": attempt.trace,
    }
    return row | ({} if attempt.votes is None else {"votes": attempt.votes})


class RecordFile:
    """The file of a cell, open for more rows. Use it as a context manager."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / FILE).open("ab")
        self._synced = time.monotonic()

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row; a kill does not lose it."""
        self._file.write(json_line(row))
        self._file.flush()
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self._sync()

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._sync()
        finally:
            self._file.close()

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()


def read_records(folder: Path, mend: bool = False) -> Records:
    """The newest row of each question. A last line that a kill cut in half is left out.

    mend: remove that half from the file, before more is written to it. Raises DataError where another line
    is no row.
    """
    file = folder / FILE
    if not file.exists():
        return {}
    data = file.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if mend and len(whole) < len(data):
        os.truncate(file, len(whole))
    rows: Records = {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            row = json.loads(line)
            rows[row["group"]] = row
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"no record of an evaluation: {error}", file=file, row=number) from None
    return rows


def cell_figures(questions: QuestionSet, rows: Records, audit: Audit | None) -> dict[str, Any]:
    """Figures of one cell over the rows that did not fail. Fractions; intervals are 95 % bootstrap ones.

    `se` is the standard error of EM as an estimate for the whole set (0 where all of it was asked).
    """
    asked = [(q, rows[q.group]) for q in questions.questions if q.group in rows]
    answered = [(q, row) for q, row in asked if not row["failure"]]
    table = [_scored(question, row) for question, row in answered]
    found = figures(table)
    del found["em_by_question"]
    strata = [
        ([s.em for s in table if questions.stratum(s.question) == name], size)
        for name, size in questions.strata.items()
    ]
    seconds = [row["seconds"] for _, row in answered]
    recall = [float(row["in_evidence"]) for _, row in answered if row["in_evidence"] is not None]
    return found | {
        "se": sampled_error(strata),
        "in_evidence": score_interval(recall) if recall else None,
        "read": mean([row["read"] for _, row in answered]),
        "seconds": {f"p{p}": float(np.percentile(seconds, p)) if seconds else 0.0 for p in (50, 95)},
        # Rows of an earlier version do not say.
        "encoded_anew": sum(row.get("encoded_anew", 0) for _, row in answered),
        "failed": len(asked) - len(answered),
        "asked": len(asked),
        "corpus": None if audit is None else audit.figures(),
    }


def _scored(question: Question, row: Mapping[str, Any]) -> Scored:
    found = scored(question, row["answer"], row["searches"], row["tokens"], row["invalid"])
    return replace(found, correct=row.get("correct", found.correct))  # rows of 0.1.0 know EM alone
