"""Questions of files: read, drawn, written, and told apart by digest.

`question_files` reads files as rows, `question_rows` reads a row as a question.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rexrag.data.question_files import read_rows
from rexrag.data.question_rows import parse_question
from rexrag.errors import ConfigError, DataError
from rexrag.io import Row, parse_rows, sha256_rows, write_jsonl
from rexrag.types import Question


def load_questions(path: str | Path, source: str = "local", split: str = "train") -> list[Question]:
    """All questions of a file. `source` and `split` stand in where a row names none.

    A missing id is the row number, from 1. Raises DataError with file, row, field and what was expected:
    for an unknown suffix, a row that cannot be read, an id seen before in its source and split, no rows.
    """
    return collect_questions(path, read_rows(path), source, split)


def collect_questions(where: str | Path, rows: Iterable[Row], source: str, split: str) -> list[Question]:
    """All questions of numbered rows; `where` is what an error calls their origin. Raises DataError."""

    def parse(number: int, row: Mapping[str, Any]) -> Question:
        return parse_question(row, number, source, split)

    questions: dict[str, Question] = {}
    for number, question in parse_rows(where, rows, parse):
        if question.group in questions:
            message = f"'{question.id}' was seen before in {question.source}/{question.split}; ids are unique"
            raise DataError(message, file=where, row=number, field="id")
        questions[question.group] = question
    if not questions:
        raise DataError("no questions; expected at least one row", file=where)
    return list(questions.values())


def rank_questions(questions: Iterable[Question], seed: int) -> list[Question]:
    """In an order that depends on `seed` and each question's group alone, not on the file's order."""
    return sorted(questions, key=lambda q: hashlib.sha256(f"{seed}/{q.group}".encode()).digest())


def draw_questions(questions: Sequence[Question], limit: int, seed: int = 0) -> list[Question]:
    """At most `limit` questions, drawn without replacement, in their old order."""
    chosen = {question.group for question in rank_questions(questions, seed)[:limit]}
    return [question for question in questions if question.group in chosen]


def write_questions(path: str | Path, questions: Iterable[Question]) -> int:
    """Plain rows as `.jsonl`, whole or not at all; returns how many. Raises ConfigError (suffix)."""
    if Path(path).suffix.lower() != ".jsonl":
        raise ConfigError(f"{path}: questions are written as .jsonl")
    return write_jsonl(path, (_row(question) for question in questions))


def questions_digest(questions: Iterable[Question]) -> str:
    """Hex SHA-256 of every field in order, for the run folder."""
    return sha256_rows(asdict(question) for question in questions)


def _row(question: Question) -> dict[str, Any]:
    """A plain row; kind and hops only where they are known."""
    row: dict[str, Any] = {"id": question.id, "question": question.text, "answers": list(question.answers)}
    row |= {"source": question.source, "split": question.split}
    optional = {"kind": question.kind, "hops": question.hops}
    return row | {field: value for field, value in optional.items() if value}
