"""Re-scoring of traces made elsewhere: rows with `question`, `answers` and `response`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rexrag.agent.protocols.tags import (
    actions,
    count_notices,
    extract_answer,
    opens_thought,
    stray_action_tags,
    well_formed,
)
from rexrag.agent.reward import score_answer
from rexrag.data.question_files import read_rows
from rexrag.data.question_rows import row_answers, row_question
from rexrag.io import FieldError, brief, check_text, parse_rows

TOLERANCE = 1e-6
"""A recorded score that differs by more than this is a disagreement."""


@dataclass(frozen=True, slots=True)
class TraceScore:
    """Scores of one recorded response. EM, F1, sub-EM are fractions in [0, 1], 0 where it never answered."""

    row: int
    """Line in the file, from 1."""
    question: str
    prediction: str | None
    """The policy's last complete answer; None where it never answered."""
    em: float
    f1: float
    sub_em: float
    searches: int
    answers: int
    malformed: int
    """Search and answer tags, in any spelling, that belong to no complete action."""
    notices: int
    """Turns that the environment called invalid."""
    well_formed: bool
    disagrees: tuple[str, ...] = ()
    """Recorded fields (`em`, `f1`, `prediction`) that we could not reproduce."""


@dataclass(frozen=True, slots=True)
class TraceTotals:
    """Means (fractions) and counts over a file."""

    rows: int
    em: float
    f1: float
    sub_em: float
    answered: int
    unanswered: int
    searches: int
    answers: int
    malformed: int
    notices: int
    well_formed: int
    disagreements: int
    """Rows with at least one recorded score that we could not reproduce."""


def score_traces(path: str | Path) -> tuple[list[TraceScore], TraceTotals]:
    """Score every row of a file (`data.question_files`). A file without rows has totals of 0.

    Fields: question and answers as in `data.question_rows`, `response` text; optional recorded `em`, `f1`
    (numbers) and `prediction` (text or null), which are compared, never trusted; optional `prompt` text.
    Raises DataError naming file, row and field.
    """
    scores = [score for _, score in parse_rows(path, read_rows(path), score_row)]
    return scores, totals(scores)


def score_row(number: int, row: Mapping[str, Any]) -> TraceScore:
    """Score one recorded row. Raises FieldError."""
    question, golds, response = row_question(row), row_answers(row), _response(row)
    prediction = extract_answer(response)
    said = prediction if prediction is not None else ""
    scored = score_answer(prediction, golds)
    kinds = [action.kind for action in actions(response)]
    ours = {"em": scored.em, "f1": scored.f1}
    recorded = {name: _recorded_score(row, name) for name in ours}
    disagrees = [n for n, value in recorded.items() if value is not None and abs(value - ours[n]) > TOLERANCE]
    if "prediction" in row and _recorded_prediction(row) != said.strip():
        disagrees.append("prediction")
    return TraceScore(
        row=number,
        question=question,
        prediction=prediction,
        em=scored.em,
        f1=scored.f1,
        sub_em=scored.sub_em,
        searches=kinds.count("search"),
        answers=kinds.count("answer"),
        malformed=stray_action_tags(response),
        notices=count_notices(response),
        well_formed=well_formed(response, _thought_opened(row)),
        disagrees=tuple(disagrees),
    )


def totals(scores: Iterable[TraceScore]) -> TraceTotals:
    """Totals over scored rows."""
    rows = list(scores)
    count = max(len(rows), 1)
    answered = sum(row.prediction is not None for row in rows)
    return TraceTotals(
        rows=len(rows),
        em=sum(row.em for row in rows) / count,
        f1=sum(row.f1 for row in rows) / count,
        sub_em=sum(row.sub_em for row in rows) / count,
        answered=answered,
        unanswered=len(rows) - answered,
        searches=sum(row.searches for row in rows),
        answers=sum(row.answers for row in rows),
        malformed=sum(row.malformed for row in rows),
        notices=sum(row.notices for row in rows),
        well_formed=sum(row.well_formed for row in rows),
        disagreements=sum(bool(row.disagrees) for row in rows),
    )


def _thought_opened(row: Mapping[str, Any]) -> bool:
    """Did the prompt open the first thought? Where the row has no prompt, the response shows it."""
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        return opens_thought(prompt)
    response = str(row["response"])
    closing, opening = response.find("</think>"), response.find("<think>")
    return prompt is None and closing >= 0 and not 0 <= opening < closing


def _response(row: Mapping[str, Any]) -> str:
    """The response, which may be empty: a policy may say nothing."""
    value = row.get("response")
    if not isinstance(value, str):
        raise FieldError("response", f"expected a text, got {brief(value)}")
    return check_text(value, "response") if value.strip() else value


def _recorded_score(row: Mapping[str, Any], field: str) -> float | None:
    value = row.get(field)
    if value is None:
        return None
    if isinstance(value, bool | int | float) and 0.0 <= value <= 1.0:
        return float(value)
    raise FieldError(field, f"expected a number from 0 to 1, got {brief(value)}")


def _recorded_prediction(row: Mapping[str, Any]) -> str:
    value = row.get("prediction")
    if value is not None and not isinstance(value, str):
        raise FieldError("prediction", f"expected a text or null, got {brief(value)}")
    return (value or "").strip()
