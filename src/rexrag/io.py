"""Files: atomic writes, digests, and rows of JSON lines or parquet with errors that name the row.

Whatever is written appears whole or not at all: it goes to a temporary name in the same folder, then is
renamed. Rows are counted from 1, as an editor counts lines.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from rexrag.errors import DataError

T = TypeVar("T")
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters: text from models, documents and servers must not steer a terminal."""
Row = tuple[int, dict[str, Any]]
"""Number of a row in its file, from 1, and its fields by name."""


class FieldError(ValueError):
    """A field of a row is wrong. Raised by row parsers; the reader adds file and row (`parse_rows`)."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def check_writable(path: str | Path) -> None:
    """Can something be made at `path`? Asked before hours of work. Raises OSError that names it."""
    path = Path(path).absolute()
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = _temporary_name(path)
        probe.mkdir()
        probe.rmdir()


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """An error about a temporary name beside `path` becomes one about `path`."""
    try:
        yield
    except OSError as error:
        if error.filename and Path(error.filename).parent == path.parent:
            error.filename = str(path)
        raise


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file to write; it replaces `path` when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(path)
    try:
        with _naming(path):
            opened = temporary.open("xb")
        with opened as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """An empty folder to fill; it replaces the folder `path` when the block ends without an error.

    What stood at `path` is removed, so the caller decides first whether that may go.
    """
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(path)
    with _naming(path):
        temporary.mkdir()
    try:
        yield temporary
        replace_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(new: Path, path: Path) -> None:
    """Rename folder `new` to `path`; what stood there is removed, and put back where the rename fails."""
    replaced = _temporary_name(path)
    try:
        # Two renames, because a folder cannot be renamed onto one that holds files.
        if path.exists():
            os.replace(path, replaced)
        os.replace(new, path)
    finally:
        if replaced.exists() and not path.exists():
            os.replace(replaced, path)
        shutil.rmtree(replaced, ignore_errors=True)


def write_bytes(path: str | Path, data: bytes) -> None:
    with atomic_file(path) as file:
        file.write(data)


def write_text(path: str | Path, text: str) -> None:
    """UTF-8, line ends as given."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, value: object) -> None:
    """Indented JSON with a final newline. NaN and infinity are refused (ValueError): they are not JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """One JSON object a line; returns how many. Streams, so `rows` may be a generator."""
    count = 0
    with atomic_file(path) as file:
        for count, row in enumerate(rows, 1):  # noqa: B007 - the last value is the answer
            file.write(json_line(row))
    return count


def json_line(row: Mapping[str, Any]) -> bytes:
    return (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_rows(rows: Iterable[object]) -> str:
    """Hex SHA-256 of JSON values in order, independent of how they were stored."""
    state = hashlib.sha256()
    for row in rows:
        state.update(json.dumps(row, sort_keys=True, separators=(",", ":")).encode("ascii") + b"\n")
    return state.hexdigest()


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file with their numbers; blank ones are skipped but counted.

    Raises DataError where the file cannot be read or a line is not UTF-8.
    """
    for number, line in _lines(path):
        try:
            yield number, line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise DataError(f"expected a text in UTF-8: {error}", file=path, row=number) from None


def read_jsonl(path: str | Path) -> Iterator[Row]:
    """Stream the objects of a JSON-lines file; blank lines are skipped but counted.

    Raises DataError where the file cannot be read or a line is not a JSON object in UTF-8.
    """
    for number, line in _lines(path):
        try:
            value = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"expected a JSON object in UTF-8: {error}", file=path, row=number) from None
        if not isinstance(value, dict):
            found = type(value).__name__
            raise DataError(f"expected a JSON object, got {found}", file=path, row=number)
        yield number, value


def _lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                yield number, line


def read_parquet(path: str | Path) -> Iterator[Row]:
    """Stream the rows of a parquet file; a null is kept as None. Raises DataError where it is not parquet."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    with _open(path) as file:
        try:
            number = 0
            for batch in parquet.ParquetFile(file).iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
        except (arrow.ArrowException, OSError) as error:
            raise DataError(f"not readable as parquet: {error}", file=path) from None


def parse_rows(
    path: str | Path, rows: Iterable[Row], parse: Callable[[int, Mapping[str, Any]], T]
) -> Iterator[tuple[int, T]]:
    """Parse each row; a FieldError becomes a DataError that names file, row and field."""
    for number, row in rows:
        try:
            parsed = parse(number, row)
        except FieldError as error:
            raise DataError(str(error), file=path, row=number, field=error.field) from None
        yield number, parsed


def text_field(row: Mapping[str, Any], field: str, name: str = "") -> str:
    """A required text that is not blank. `name` is what an error calls it. Raises FieldError."""
    if row.get(field) is None:
        raise FieldError(name or field, "missing; expected a text")
    return check_text(row[field], name or field)


def check_text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise FieldError(name, f"expected a text, got {brief(value)}")
    if not value.strip():
        raise FieldError(name, "expected a text that is not blank")
    # JSON can spell half a surrogate pair; nothing downstream could write it again.
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise FieldError(name, "expected valid Unicode, got a lone surrogate")
    return value


def id_field(row: Mapping[str, Any], field: str, default: int) -> str:
    """An id: a text or a whole number; the row number where it is missing. Raises FieldError."""
    value = row.get(field)
    if value is None:
        return str(default)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise FieldError(field, f"expected a text or a whole number, got {brief(value)}")
    return check_text(value, field)


def brief(value: object) -> str:
    """A value for an error message: its type and the first characters of it."""
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"


def printable(text: str) -> str:
    """The text without control characters (line ends and tabs stay)."""
    return _UNPRINTABLE.sub("�", text)


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def _open(path: str | Path) -> BinaryIO:
    try:
        return Path(path).open("rb")
    except FileNotFoundError:
        raise DataError("no such file", file=path) from None
    except OSError as error:
        raise DataError(f"not readable: {error.strerror}", file=path) from None


_SAID: set[str] = set()


def say_once(line: str) -> None:
    """One line on standard error, the first time that it is said in this process."""
    if line not in _SAID:
        _SAID.add(line)
        print(f"rexrag: {printable(line)}", file=sys.stderr)
