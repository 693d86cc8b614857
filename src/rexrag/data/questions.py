"""Questions: reading the formats in use, and writing them.

Two kinds of row are known, in `.jsonl` or `.parquet`, told apart by their fields:

    plain      {"id"?, "question", "answers"}; FlashRAG's "golden_answers" does for "answers";
               optional: "source", "split", "kind", "hops"
    Search-R1  {"data_source", "prompt": [{"role", "content"}], "extra_info": {"split", "index"},
               "reward_model": {"ground_truth": {"target": […]}}};
               the question is what follows the prompt's last "Question:"
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rexrag.errors import ConfigError, DataError
from rexrag.io import (
    FieldError,
    Row,
    brief,
    check_text,
    id_field,
    parse_rows,
    read_jsonl,
    read_parquet,
    sha256_rows,
    text_field,
    write_jsonl,
)
from rexrag.types import Question

READERS: Mapping[str, Callable[[Path], Iterator[Row]]] = {".jsonl": read_jsonl, ".parquet": read_parquet}
QUESTION_MARK = "Question:"
"""What stands before the question in Search-R1's prompts."""


def load_questions(path: str | Path, source: str = "local", split: str = "train") -> list[Question]:
    """All questions of a file. `source` and `split` stand in where a row names none.

    A missing id is the row number, from 1. Raises DataError with file, row, field and what was expected:
    for an unknown suffix, a row that cannot be read, an id seen before in its source and split, no rows.
    """
    path = Path(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"unknown suffix '{path.suffix}'; expected {' or '.join(READERS)}", file=path)
    return collect_questions(path, reader(path), source, split)


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


def parse_question(
    row: Mapping[str, Any], number: int, source: str = "local", split: str = "train"
) -> Question:
    """One row of either kind. Raises rexrag.io.FieldError."""
    searched = row.get("reward_model") is not None
    # A trace may carry its prompt beside the plain question; then the plain question is the better source.
    searched = searched or (row.get("question") is None and row.get("prompt") is not None)
    return _search_r1(row, number, split) if searched else _plain(row, number, source, split)


def write_questions(path: str | Path, questions: Iterable[Question]) -> int:
    """Plain rows as `.jsonl`, whole or not at all; returns how many. Raises ConfigError (suffix)."""
    if Path(path).suffix.lower() != ".jsonl":
        raise ConfigError(f"{path}: questions are written as .jsonl")
    return write_jsonl(path, (_row(question) for question in questions))


def questions_digest(questions: Iterable[Question]) -> str:
    """Hex SHA-256 of every field in order, for the run folder."""
    return sha256_rows(asdict(question) for question in questions)


def _plain(row: Mapping[str, Any], number: int, source: str, split: str) -> Question:
    answers = "answers" if row.get("answers") is not None else "golden_answers"
    if row.get(answers) is None:
        raise FieldError("answers", "missing; expected a list of texts (or `golden_answers`)")
    return Question(
        id=id_field(row, "id", default=number),
        text=text_field(row, "question"),
        answers=_answers(row[answers], answers),
        source=_optional_text(row, "source", source),
        split=_optional_text(row, "split", split),
        hops=_hops(row),
        kind=_optional_text(row, "kind", _flashrag_type(row)),
    )


def _flashrag_type(row: Mapping[str, Any]) -> str:
    """FlashRAG keeps the type of a question among its metadata, where the data set has one."""
    metadata = row.get("metadata")
    found = metadata.get("type") if isinstance(metadata, Mapping) else None
    return found.strip() if isinstance(found, str) else ""


def _search_r1(row: Mapping[str, Any], number: int, split: str) -> Question:
    target = "reward_model.ground_truth.target"
    truth = _table(_table(row, "reward_model"), "ground_truth", "reward_model.ground_truth")
    if truth.get("target") is None:
        raise FieldError(target, "missing; expected a list of texts")
    extra = _table(row, "extra_info") if row.get("extra_info") is not None else {}
    try:
        name = id_field(extra, "index", default=number)
    except FieldError as error:
        raise FieldError("extra_info.index", str(error)) from None
    return Question(
        id=name,
        text=bare_question(_user_message(row)),
        answers=_answers(truth["target"], target),
        source=text_field(row, "data_source"),
        split=_optional_text(extra, "split", split, "extra_info.split"),
        hops=_hops(row),
        kind=_optional_text(row, "kind", ""),
    )


def bare_question(message: str) -> str:
    """The question in an instruction: what follows the last "Question:", or all of it. Raises FieldError."""
    return check_text(message.rpartition(QUESTION_MARK)[2], "prompt.content").strip()


def _user_message(row: Mapping[str, Any]) -> str:
    messages = row.get("prompt")
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise FieldError("prompt", f"expected a list of messages, got {brief(messages)}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise FieldError(f"prompt.{i}", f"expected a message with role and content, got {brief(message)}")
    users = [i for i, message in enumerate(messages) if message.get("role") == "user"]
    if not users:
        raise FieldError("prompt", "expected a message whose role is 'user'")
    return text_field(messages[users[-1]], "content", f"prompt.{users[-1]}.content")


def _answers(value: object, field: str) -> tuple[str, ...]:
    # A lone text is refused, not split into letters and not wrapped: nobody can tell what was meant.
    if not isinstance(value, list):
        raise FieldError(field, f"expected a list of texts, got {brief(value)}")
    if not value:
        raise FieldError(field, "expected at least one answer")
    return tuple(check_text(answer, f"{field}.{i}") for i, answer in enumerate(value))


def _hops(row: Mapping[str, Any]) -> int:
    hops = row.get("hops")
    if hops is None:
        return 0
    if not isinstance(hops, int) or isinstance(hops, bool) or hops < 0:
        raise FieldError("hops", f"expected a whole number of at least 0, got {brief(hops)}")
    return hops


def _optional_text(row: Mapping[str, Any], field: str, default: str, name: str = "") -> str:
    value = row.get(field)
    # A blank text says as little as a missing one.
    return check_text(value, name or field) if value is not None and value != "" else default


def _table(row: Mapping[str, Any], field: str, name: str = "") -> Mapping[str, Any]:
    value = row.get(field)
    if not isinstance(value, Mapping):
        raise FieldError(name or field, f"expected an object, got {brief(value)}")
    return value


def _row(question: Question) -> dict[str, Any]:
    """A plain row; kind and hops only where they are known."""
    row: dict[str, Any] = {"id": question.id, "question": question.text, "answers": list(question.answers)}
    row |= {"source": question.source, "split": question.split}
    optional = {"kind": question.kind, "hops": question.hops}
    return row | {field: value for field, value in optional.items() if value}
