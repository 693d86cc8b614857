"""One row of a question file as a `Question`, in the shapes in which question sets are published.

| shape | fields |
|---|---|
| plain | `id`?, `question`, `answers`; optional `source`, `split`, `kind`, `hops` |
| FlashRAG | `golden_answers`; the type of a question in `metadata.type` |
| HotpotQA, 2Wiki | `_id`, `answer` (a text), `type` |
| MuSiQue | `answer` and `answer_aliases`; one hop an entry of `question_decomposition` |
| TriviaQA | `question_id` or `QuestionId`, `answer` or `Answer` with a value and its aliases |
| NQ-open | `answer` (a list) |
| PopQA | `possible_answers` (a list written as JSON text) |
| Search-R1, verl | `data_source`, `prompt` (messages), `reward_model.ground_truth`, `extra_info` |

What an answer may be is decided once, by `answer_texts`, for every command that reads answers.
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rexrag.io import FieldError, brief, check_text, id_field, text_field
from rexrag.types import Question

QUESTION_MARK = "Question:"
"""What stands before the question in Search-R1's prompts."""
IDS = ("id", "_id", "question_id", "QuestionId")
QUESTIONS = ("question", "Question")
ANSWERS = ("answers", "golden_answers", "possible_answers", "answer", "Answer")
"""Names of one thing, in the order in which they are looked for."""
ALIASES = ("answer_aliases", "aliases")
_PARTS = ("value", "Value", "target", "text", "aliases", "Aliases", "normalized_aliases", "NormalizedAliases")
"""Fields of an answer that is an object: TriviaQA's, Search-R1's, SQuAD's."""


def parse_question(
    row: Mapping[str, Any], number: int, source: str = "local", split: str = "train"
) -> Question:
    """One row; `source` and `split` stand in where it names none. Raises rexrag.io.FieldError."""
    searched = row.get("reward_model") is not None
    # A trace may carry its prompt beside the plain question; then the plain question is the better source.
    searched = searched or (_name(row, QUESTIONS) is None and row.get("prompt") is not None)
    return _search_r1(row, number, split) if searched else _plain(row, number, source, split)


def row_question(row: Mapping[str, Any]) -> str:
    """The question's text. Raises FieldError."""
    field = _name(row, QUESTIONS)
    if field is None:
        raise FieldError("question", f"missing; expected a text; {_seen(row)}")
    return text_field(row, field)


def row_answers(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The accepted answers of a row, aliases last. Raises FieldError."""
    field = _name(row, ANSWERS)
    if field is None:
        expected = f"missing; expected a text, a number or a list (or {', '.join(ANSWERS[1:])})"
        raise FieldError("answers", f"{expected}; {_seen(row)}")
    found = answer_texts(row[field], field)
    for name in ALIASES:
        if row.get(name):
            found += answer_texts(row[name], name)
    return tuple(dict.fromkeys(found))


def answer_texts(value: object, field: str) -> tuple[str, ...]:
    """The texts of an answer: a text, a number, a list of these, a list written as JSON, or an object.

    Equal texts are kept once. Raises FieldError naming `field`.
    """
    if isinstance(value, str):
        listed = _written_list(value)
        return (check_text(value, field),) if listed is None else answer_texts(listed, field)
    if isinstance(value, Mapping):
        parts = [part for part in _PARTS if value.get(part)]
        if not parts:
            raise FieldError(field, f"expected one of {', '.join(_PARTS[:4])} in it, got {brief(value)}")
        found = (text for part in parts for text in answer_texts(value[part], f"{field}.{part}"))
        return tuple(dict.fromkeys(found))
    if not isinstance(value, list | tuple):
        return (_answer_text(value, field),)
    if not value:
        raise FieldError(field, "expected at least one answer")
    return tuple(dict.fromkeys(_answer_text(one, f"{field}.{i}") for i, one in enumerate(value)))


def bare_question(message: str) -> str:
    """The question in an instruction: what follows the last "Question:", or all of it. Raises FieldError."""
    return check_text(message.rpartition(QUESTION_MARK)[2], "prompt.content").strip()


def _answer_text(value: object, field: str) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        # A column of whole numbers with a gap in it comes back from parquet as 1960.0.
        return str(int(value)) if float(value).is_integer() else str(value)
    if not isinstance(value, str):
        raise FieldError(field, f"expected a text, a number or a list of them, got {brief(value)}")
    return check_text(value, field)


def _written_list(text: str) -> object | None:
    """The list or object that a text spells as JSON or as Python does; None where it spells neither."""
    text = text.strip()
    if not text.startswith(("[", "{")):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            value: object = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        usable = (isinstance(value, list) and value) or (
            isinstance(value, dict) and any(value.get(part) for part in _PARTS)
        )
        return value if usable else None
    return None


def _plain(row: Mapping[str, Any], number: int, source: str, split: str) -> Question:
    return Question(
        id=id_field(row, _name(row, IDS) or "id", default=number),
        text=row_question(row),
        answers=row_answers(row),
        source=_optional_text(row, "source", source),
        split=_optional_text(row, "split", split),
        hops=_hops(row),
        kind=_optional_text(row, "kind", _type(row)),
    )


def _type(row: Mapping[str, Any]) -> str:
    """The type of a question: HotpotQA and 2Wiki name it, FlashRAG keeps it among its metadata."""
    metadata = row.get("metadata")
    found = metadata.get("type") if isinstance(metadata, Mapping) else row.get("type")
    return found.strip() if isinstance(found, str) else ""


def _search_r1(row: Mapping[str, Any], number: int, split: str) -> Question:
    field = "reward_model.ground_truth"
    truth = _table(row, "reward_model").get("ground_truth")
    if truth is None:
        raise FieldError(field, "missing; expected a text, a number, a list, or an object with `target`")
    extra = _table(row, "extra_info") if row.get("extra_info") is not None else {}
    try:
        name = id_field(extra, "index", default=number)
    except FieldError as error:
        raise FieldError("extra_info.index", str(error)) from None
    message = _user_message(row)
    asked = extra.get("question")
    # An instruction without the mark cannot be told from its question; verl's sets carry the question apart.
    if QUESTION_MARK not in message and isinstance(asked, str) and asked.strip():
        message = asked
    return Question(
        id=name,
        text=bare_question(message),
        answers=answer_texts(truth, field),
        source=text_field(row, "data_source"),
        split=_optional_text(extra, "split", split, "extra_info.split"),
        hops=_hops(row),
        kind=_optional_text(row, "kind", ""),
    )


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


def _hops(row: Mapping[str, Any]) -> int:
    hops, steps = row.get("hops"), row.get("question_decomposition")
    if hops is None:
        return len(steps) if isinstance(steps, list) else 0
    if not isinstance(hops, int) or isinstance(hops, bool) or hops < 0:
        raise FieldError("hops", f"expected a whole number of at least 0, got {brief(hops)}")
    return hops


def _name(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first of the names that the row has a value for."""
    return next((name for name in names if row.get(name) is not None), None)


def _seen(row: Mapping[str, Any]) -> str:
    names = [str(name) for name in row]
    shown = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    return f"this row has {shown}" if names else "this row has no field"


def _optional_text(row: Mapping[str, Any], field: str, default: str, name: str = "") -> str:
    value = row.get(field)
    # A blank text says as little as a missing one.
    return check_text(value, name or field) if value is not None and value != "" else default


def _table(row: Mapping[str, Any], field: str, name: str = "") -> Mapping[str, Any]:
    value = row.get(field)
    if not isinstance(value, Mapping):
        raise FieldError(name or field, f"expected an object, got {brief(value)}")
    return value
