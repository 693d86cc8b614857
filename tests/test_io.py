"""Files appear whole or not at all, and a bad row is named."""

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rexrag import io
from rexrag.errors import DataError

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@settings(max_examples=40)
@given(rows=st.lists(st.dictionaries(st.text(), json_values, max_size=4), max_size=6))
def test_jsonl_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, object]]) -> None:
    path = tmp_path_factory.mktemp("io") / "rows.jsonl"
    assert io.write_jsonl(path, iter(rows)) == len(rows)
    assert list(io.read_jsonl(path)) == list(enumerate(rows, 1))


def test_json_text_and_bytes_round_trip(tmp_path: Path) -> None:
    io.write_json(tmp_path / "deep" / "a.json", {"é": [1, None]})
    assert json.loads((tmp_path / "deep" / "a.json").read_text(encoding="utf-8")) == {"é": [1, None]}
    io.write_text(tmp_path / "a.txt", "é\r\n\n")
    assert (tmp_path / "a.txt").read_bytes() == "é\r\n\n".encode()
    assert io.sha256_file(tmp_path / "a.txt") == hashlib.sha256("é\r\n\n".encode()).hexdigest()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("old")

    def rows():
        yield {"a": 1}
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        io.write_jsonl(path, rows())
    with pytest.raises(ValueError, match="not JSON compliant"):
        io.write_json(path, float("nan"))
    assert path.read_text() == "old"
    assert left_over(tmp_path) == ["rows.jsonl"]


def test_a_reader_of_the_old_file_never_sees_the_new_one_half_written(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("old" * 10)
    with path.open() as reader:
        io.write_text(path, "new" * 10)
        assert reader.read() == "old" * 10
    assert path.read_text() == "new" * 10


def test_a_written_file_has_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    io.write_text(tmp_path / "atomic", "")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    for name in ("one", "two"):
        with io.atomic_folder(target) as folder:
            (folder / name).write_text(name)
            assert not (target / name).exists()
        assert left_over(target) == [name]
    with pytest.raises(RuntimeError), io.atomic_folder(target) as folder:
        (folder / "three").write_text("half")
        raise RuntimeError
    assert left_over(target) == ["two"]
    assert left_over(tmp_path) == ["folder"]


def test_a_relative_folder_can_be_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with io.atomic_folder(".") as folder:
        (folder / "a").write_text("a")
    assert left_over(tmp_path / "here") == ["a"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"a": 1', "expected a JSON object"),
        (b"[1]", "got list"),
        (b"null", "got NoneType"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b"[" * 100_000, "expected a JSON object"),
        (b'{"a": ' + b"9" * 5000 + b"}", "expected a JSON object"),
    ],
)
def test_a_bad_line_is_named_by_file_and_row(tmp_path: Path, line: bytes, expected: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=expected) as caught:
        list(io.read_jsonl(path))
    assert str(caught.value).startswith(f"{path}, row 3: ")
    assert "\n" not in str(caught.value)


def test_byte_order_mark_windows_line_ends_and_unicode_line_breaks_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + '{"a": "x\u2028y"}\r\n{"a": "z"}'.encode())
    assert list(io.read_jsonl(path)) == [(1, {"a": "x\u2028y"}), (2, {"a": "z"})]


@pytest.mark.parametrize("read", [io.read_jsonl, io.read_parquet])
def test_unreadable_files_are_named(tmp_path: Path, read) -> None:
    with pytest.raises(DataError, match=r"absent: no such file"):
        list(read(tmp_path / "absent"))
    with pytest.raises(DataError, match="not readable"):
        list(read(tmp_path))


def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match="not readable as parquet"):
        list(io.read_parquet(path))


def test_digest_of_rows_depends_on_values_and_order_only() -> None:
    rows = [{"a": 1, "b": "é"}, ["x"]]
    assert io.sha256_rows(rows) == io.sha256_rows([{"b": "é", "a": 1}, ["x"]])
    assert io.sha256_rows(rows) != io.sha256_rows(rows[::-1])
    assert io.sha256_rows(["ab", "c"]) != io.sha256_rows(["a", "bc"])


@pytest.mark.parametrize("value", [None, 3, ["x"], "", "  \n", "half \ud800 pair"])
def test_a_text_field_is_text(value: object) -> None:
    with pytest.raises(io.FieldError) as caught:
        io.text_field({"f": value}, "f")
    assert caught.value.field == "f"


@pytest.mark.parametrize(("value", "expected"), [(None, "7"), (0, "0"), (12, "12"), ("x1", "x1")])
def test_ids(value: object, expected: str) -> None:
    assert io.id_field({"id": value}, "id", default=7) == expected


@pytest.mark.parametrize("value", [True, 1.5, "", [], {}])
def test_bad_ids(value: object) -> None:
    with pytest.raises(io.FieldError):
        io.id_field({"id": value}, "id", default=7)


def test_brief_is_brief() -> None:
    assert io.brief(3) == "int 3"
    assert len(io.brief("x" * 10_000)) < 80


def test_control_characters_are_not_printed():
    assert io.printable("a\x1b[2Jb\x07\n\tc\x9b") == "a�[2Jb�\n\tc�"


def test_what_cannot_be_written_is_named_before_and_after(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        io.write_text(path, "y")

    def fill(path: Path) -> None:
        with io.atomic_folder(path):
            pass

    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "out", Path("/proc/nothing")):
        for make in (io.check_writable, write, fill):
            with pytest.raises(OSError) as caught:
                make(path)
            assert ".tmp" not in str(caught.value)
    io.check_writable(tmp_path / "new" / "out")
    assert left_over(tmp_path) == ["file", "new"] and left_over(tmp_path / "new") == []


def test_a_line_is_said_once_and_never_controls_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(io, "_SAID", set())
    for line in ("a is now b", "a is now b", "\x1b[2Jc"):
        io.say_once(line)
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "rexrag: a is now b\nrexrag: \ufffd[2Jc\n")
