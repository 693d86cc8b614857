"""Corpora: one passage a line, as Search-R1, FlashRAG and BEIR write them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rexrag.errors import DataError
from rexrag.io import FieldError, check_text, id_field, parse_rows, read_jsonl, sha256_rows, text_field
from rexrag.types import Document

ID_FIELDS = ("id", "_id", "docid", "doc_id", "pid")
"""Usual names of a passage's id; the first one that a row has is taken."""


def read_corpus(path: str | Path, *, unique: bool = True) -> Iterator[Document]:
    """Stream the documents of a `corpus.jsonl`, packed or not.

    A row holds `contents` (`"Title"`, newline, text) or `text` with or without a `title`, and an id under one
    of ID_FIELDS; a missing id is the row number, from 1. Raises DataError with file, row and field for a
    malformed row or an id seen before, and with the file for an empty corpus. `unique` false leaves ids to
    the caller: the check keeps every id in memory.
    """
    rows = parse_rows(path, read_jsonl(path), parse_document)
    return _refuse_duplicates(rows, path) if unique else (document for _, document in rows)


def parse_document(number: int, row: Mapping[str, Any]) -> Document:
    """One row of a corpus. Raises FieldError."""
    field = next((field for field in ID_FIELDS if row.get(field) is not None), "id")
    name = id_field(row, field, default=number)
    if row.get("contents") is not None:
        return Document(name, text_field(row, "contents"))
    if not isinstance(row.get("text"), str):
        if row.get("text") is not None:
            check_text(row["text"], "text")
        seen = ", ".join(list(row)[:8]) or "none"
        raise FieldError("contents", f"missing; expected `contents` or `text`, the row's fields are: {seen}")
    # BEIR has passages without a title, and some that are a title only.
    title = _text_or_empty(row, "title").strip().strip('"')
    text = "" if title and not row["text"].strip() else check_text(row["text"], "text")
    return Document(name, f'"{title}"\n{text}')


def _text_or_empty(row: Mapping[str, Any], field: str) -> str:
    value = row.get(field)
    blank = value is None or (isinstance(value, str) and not value.strip())
    return "" if blank else check_text(value, field)


def documents_digest(documents: Iterable[Document]) -> str:
    """Hex SHA-256 of ids and contents in order: the same however the corpus was stored."""
    return sha256_rows([document.id, document.contents] for document in documents)


def _refuse_duplicates(rows: Iterable[tuple[int, Document]], path: str | Path) -> Iterator[Document]:
    seen: set[str] = set()
    for number, document in rows:
        if document.id in seen:
            raise DataError(
                f"'{document.id}' was seen before; ids are unique", file=path, row=number, field="id"
            )
        seen.add(document.id)
        yield document
    if not seen:
        raise DataError("the corpus is empty; expected one JSON object a line", file=path)
