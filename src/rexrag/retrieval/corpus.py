"""Corpora: one passage a line, as Search-R1 and FlashRAG write them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rexrag.errors import DataError
from rexrag.io import FieldError, id_field, parse_rows, read_jsonl, sha256_rows, text_field
from rexrag.types import Document


def read_corpus(path: str | Path, *, unique: bool = True) -> Iterator[Document]:
    """Stream the documents of a `corpus.jsonl`.

    A row holds `id, contents` (contents = `"Title"`, newline, text) or `title, text` with or without an
    `id`. A missing id is the row number, from 1. Raises DataError with file, row and field for a malformed
    row or an id seen before, and with the file for an empty corpus. `unique` false leaves ids to the caller:
    the check keeps every id in memory.
    """
    rows = parse_rows(path, read_jsonl(path), parse_document)
    return _refuse_duplicates(rows, path) if unique else (document for _, document in rows)


def parse_document(number: int, row: Mapping[str, Any]) -> Document:
    """One row of a corpus. Raises FieldError."""
    name = id_field(row, "id", default=number)
    if row.get("contents") is not None:
        return Document(name, text_field(row, "contents"))
    if row.get("title") is None and row.get("text") is None:
        raise FieldError("contents", "missing; expected `contents`, or `title` and `text`")
    title = text_field(row, "title").strip().strip('"')
    return Document(name, f'"{title}"\n{text_field(row, "text")}')


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
