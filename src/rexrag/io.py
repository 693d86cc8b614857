"""Files: atomic writes, digests, and rows of JSON lines or parquet with errors that name the row.

Text files are read packed too (gzip, zstd, bzip2, xz), whatever they are called. Whatever is written appears
whole or not at all: it goes to a temporary name in the same folder, then is renamed. Rows are counted from 1,
as an editor counts lines.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import secrets
import shutil
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import zstandard

from rexrag.errors import DataError

T = TypeVar("T")
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters: text from models, documents and servers must not steer a terminal."""
_TEMPORARY = re.compile(r"\.(.+)\.(\d+)-[0-9a-f]{8}\.tmp")
"""The name that something is written under before it is renamed, and the process that writes it."""
PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz"}
"""First bytes of packed files."""
UNPACKING = (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError)
"""What reading a damaged packed file raises."""
LINE_BYTES = 64 * 2**20
"""The longest line that is read."""
ZSTD_WINDOW = 2**27
"""Memory that unpacking may take: what `zstd -d` allows."""
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
        probe = temporary_name(path)
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
    temporary = temporary_name(path)
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
    temporary = temporary_name(path)
    with _naming(path):
        temporary.mkdir()
    try:
        yield temporary
        replace_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(new: Path, path: Path) -> None:
    """Rename folder `new` to `path`; what stood there is removed, and put back where the rename fails."""
    replaced = temporary_name(path)
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


def read_text(path: str | Path) -> str:
    """A whole text file, without a byte order mark. Raises DataError where it is no text in UTF-8."""
    with _open(path) as file:
        data = file.read()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"expected a text in UTF-8: {error}", file=path) from None


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
    with open_text(path) as file:
        number = 0
        while line := _line(file, path, number := number + 1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                yield number, line


def _line(file: BinaryIO, path: str | Path, number: int) -> bytes:
    """The next line, empty at the end. A few kilobytes of a packed file can hold a line of gigabytes."""
    try:
        line = file.readline(LINE_BYTES + 1)
    except UNPACKING as error:
        raise DataError(f"damaged or cut off: {error}", file=path, row=number) from None
    if len(line) > LINE_BYTES:
        raise DataError(f"a line of more than {LINE_BYTES:,} bytes", file=path, row=number)
    return line


def packing(path: str | Path) -> str:
    """How a file is packed, by its first bytes: gzip, zstd, bzip2, xz; empty where it is not."""
    with _open(path) as file:
        begin = file.read(max(map(len, PACKED)))
    return next((name for magic, name in PACKED.items() if begin.startswith(magic)), "")


def open_text(path: str | Path) -> BinaryIO:
    """The bytes of a text file, unpacked as they are read. Raises DataError where it cannot be read."""
    kind = packing(path)
    if kind == "gzip":
        return cast(BinaryIO, gzip.open(path))
    if kind == "bzip2":
        return cast(BinaryIO, bz2.open(path))
    if kind == "xz":
        return cast(BinaryIO, lzma.open(path))
    file = _open(path)
    if kind == "zstd":
        unpacking = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW)
        unpacked = unpacking.stream_reader(file, read_across_frames=True)
        return cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, unpacked)))
    return file


def read_parquet(path: str | Path) -> Iterator[Row]:
    """Stream the rows of a parquet file; a null is kept as None. Raises DataError where it is not parquet."""
    with _open(path) as file:
        yield from parquet_rows(path, file)


def parquet_rows(path: str | Path, file: BinaryIO) -> Iterator[Row]:
    """The rows of an open parquet file; `path` is what errors call it. Raises DataError."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

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


def temporary_name(path: Path) -> Path:
    """A name beside `path` to write under before it is renamed; `sweep` knows it."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def is_temporary(path: Path) -> bool:
    """Whether a name is one that this module writes under before it renames."""
    return _TEMPORARY.fullmatch(path.name) is not None


def sweep(path: str | Path) -> None:
    """Remove what killed processes left of writing `path`: temporary names beside it.

    Those of a process that is alive are left alone.
    """
    path = Path(path).absolute()
    if not path.parent.is_dir():
        return
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        found = _TEMPORARY.fullmatch(left.name)
        if found is None or found[1] != path.name or _alive(int(found[2])):
            continue
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


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
