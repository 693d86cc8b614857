"""Files of questions as numbered rows: `.jsonl`, `.json`, `.parquet`, `.tsv`, `.csv`, also packed.

| suffix | what is in it |
|---|---|
| `.jsonl` | an object a line |
| `.json` | a list of objects (HotpotQA), an object that holds one (TriviaQA's `Data`), or an object a line |
| `.parquet` | a table |
| `.tsv`, `.csv` | a table with a header (PopQA), or two columns without one: question, answers (DPR's NQ) |

Each may be packed: `.gz`, `.zst`, `.bz2` or `.xz` is added to its name.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rexrag.data.question_rows import ANSWERS, QUESTIONS
from rexrag.errors import DataError
from rexrag.io import LINE_BYTES, UNPACKING, Row, open_text, packing, parquet_rows, read_jsonl, read_parquet

PACKED = (".gz", ".zst", ".bz2", ".xz")
"""Suffixes of packed files. What is in them is told by their first bytes, not by their names."""
MOST_BYTES = 2**32
"""Of a file that must be read whole: a small packed file can unpack to one that fills the memory."""


def read_rows(path: str | Path) -> Iterator[Row]:
    """The rows of a file with their numbers, from 1. Raises DataError; for an unknown suffix at once."""
    suffix = file_format(path)
    reader = READERS.get(suffix)
    if reader is None:
        raise DataError(f"unknown suffix '{suffix}'; expected {', '.join(READERS)}", file=path)
    return reader(Path(path))


def file_format(path: str | Path) -> str:
    """The suffix that says how a file is read: the last one, but for that of its packing."""
    return _without_packing(path).suffix.lower()


def file_stem(path: str | Path) -> str:
    """The name of a file without what says how it is read."""
    return _without_packing(path).stem


def read_json(path: Path) -> Iterator[Row]:
    """The objects of a JSON file. Raises DataError."""
    try:
        text = _whole(path).decode("utf-8-sig")
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if _is_json_lines(path):
            yield from read_jsonl(path)
            return
        raise DataError(f"expected JSON in UTF-8: {error}", file=path) from None
    for number, row in enumerate(_listed(value), 1):
        if not isinstance(row, dict):
            raise DataError(f"expected an object, got {type(row).__name__}", file=path, row=number)
        yield number, row


def read_table(path: Path) -> Iterator[Row]:
    """The rows of a table whose columns are separated by tabs or commas. Raises DataError."""
    before = csv.field_size_limit(LINE_BYTES)
    try:
        with open_text(path) as file, io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
            first = text.readline(LINE_BYTES)
            mark = "\t" if "\t" in first else ","
            header = next(csv.reader([first], delimiter=mark), [])
            rows = csv.reader(text, delimiter=mark)
            if not {*QUESTIONS} & {*header}:
                if len(header) != 2:
                    seen = ", ".join(header[:12])
                    expected = f"a column '{QUESTIONS[0]}', or two columns: question and answers"
                    raise DataError(f"expected {expected}; the first row has {seen}", file=path, row=1)
                yield 1, dict(zip((QUESTIONS[0], ANSWERS[0]), header, strict=True))
                header = [QUESTIONS[0], ANSWERS[0]]
            for number, cells in enumerate(rows, 2):
                if cells and len(cells) != len(header):
                    expected = f"expected {len(header)} columns, got {len(cells)}"
                    raise DataError(expected, file=path, row=number)
                if cells:  # an empty cell is a value that is not there
                    yield number, {name: cell or None for name, cell in zip(header, cells, strict=True)}
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"not readable as a table in UTF-8: {error}", file=path) from None
    except UNPACKING as error:
        raise DataError(f"damaged or cut off: {error}", file=path) from None
    finally:
        csv.field_size_limit(before)


def read_packed_parquet(path: Path) -> Iterator[Row]:
    """The rows of a parquet file. A packed one is read whole: parquet is read from its end."""
    return parquet_rows(path, io.BytesIO(_whole(path))) if packing(path) else read_parquet(path)


READERS: Mapping[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".parquet": read_packed_parquet,
    ".tsv": read_table,
    ".csv": read_table,
}


def _whole(path: Path) -> bytes:
    try:
        with open_text(path) as file:
            data = file.read(MOST_BYTES + 1)
    except UNPACKING as error:
        raise DataError(f"damaged or cut off: {error}", file=path) from None
    if len(data) > MOST_BYTES:
        raise DataError(f"more than {MOST_BYTES:,} bytes", file=path)
    return data


def _without_packing(path: str | Path) -> Path:
    path = Path(path)
    return path.with_suffix("") if path.suffix.lower() in PACKED else path


def _is_json_lines(path: Path) -> bool:
    """Is the first line an object of its own?"""
    try:
        next(read_jsonl(path), None)
    except DataError:
        return False
    return True


def _listed(value: object) -> list[Any]:
    """The rows of a JSON value: a list, the list inside an object, or the object as the only row."""
    if isinstance(value, list):
        return value
    if isinstance(value, dict):
        lists = [inner for name, inner in value.items() if name.lower() in ("data", "questions", "examples")]
        return lists[0] if lists and isinstance(lists[0], list) else [value]
    return [value]
