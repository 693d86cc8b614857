"""Flipped bits, kills and full disks: an index is whole, or one line says what is wrong with it."""

import errno
import os
import random
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from rexrag.data.world.generator import World
from rexrag.errors import IndexFolderError
from rexrag.io import is_temporary, sweep, temporary_name, write_jsonl
from rexrag.retrieval.index import build
from rexrag.retrieval.index.build import STATE, BuildOptions, build_index
from rexrag.retrieval.index.folder import MANIFEST, check_index, load_index, read_manifest
from tests.support.attacks import environment, rexrag

KINDS = ["bm25", "bm25-disk", *(["bm25-fast"] if find_spec("seismic") else [])]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    world = World(seed=3, people=300)
    write_jsonl(path, ({"id": d.id, "contents": d.contents} for d in world.documents))
    return path


@pytest.fixture(scope="module", params=KINDS)
def index(request: pytest.FixtureRequest, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flips") / "index"
    build_index(corpus, folder, BuildOptions(kind=request.param))
    return folder


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


@pytest.mark.parametrize("flips", [280, pytest.param(2000, marks=pytest.mark.slow)])
def test_every_flipped_bit_is_found_when_the_index_is_opened(index: Path, flips: int) -> None:
    """One bit anywhere in any file, its manifest included; then it is flipped back."""
    rng = random.Random(5)
    files = sorted(path for path in index.rglob("*") if path.is_file() and path.stat().st_size)
    missed = []
    for number in range(flips):
        path = files[number % len(files)]
        bit = rng.randrange(8 * path.stat().st_size)
        flip(path, bit)
        for find in (load_index, check_index):
            try:
                find(index)
                missed.append((path.name, bit))
            except IndexFolderError as error:
                assert "\n" not in str(error)
        flip(path, bit)
    assert missed == []
    load_index(index, verify=True)


def test_the_command_line_names_the_damaged_file(index: Path) -> None:
    assert "whole: " in rexrag("index", "check", index).stdout
    flip(index / "documents.jsonl", 12345)
    done = rexrag("index", "check", index)
    flip(index / "documents.jsonl", 12345)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert f"{index / 'documents.jsonl'}: its bytes have changed" in done.stderr


KILLER = """
import os, random, sys, time
from rexrag.retrieval.index.build import BuildOptions, build_index
corpus, out, kind, kills = *sys.argv[1:4], int(sys.argv[4])
rng = random.Random(11)
begun = time.monotonic()
build_index(corpus, out + "-whole", BuildOptions(kind=kind))
whole = time.monotonic() - begun
killed = 0
for _ in range(kills):
    child = os.fork()
    if not child:
        try:
            build_index(corpus, out, BuildOptions(kind=kind))
        except BaseException as error:
            print(type(error).__name__, error, flush=True)
        os._exit(0)
    time.sleep(rng.uniform(0.0, 1.2) * whole)
    os.kill(child, 9)
    killed += os.waitpid(child, 0)[1] == 9
build_index(corpus, out, BuildOptions(kind=kind))
print("killed", killed)
"""


@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_build_that_is_killed_anywhere_goes_on(kind: str, kills: int, corpus: Path, tmp_path: Path) -> None:
    """Killed after a random time, over and over, into one folder; the last call is let go on."""
    out = tmp_path / "index"
    words = [sys.executable, "-c", KILLER, str(corpus), str(out), kind, str(kills)]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    word, count = done.stdout.split()
    assert word == "killed" and int(count) > kills // 4
    queries = ["Who is married to Anna?", "mayor", "capital"]
    expected = load_index(tmp_path / "index-whole").search(queries, 5)
    assert load_index(out, verify=True).search(queries, 5) == expected
    shutil.rmtree(tmp_path / "index-whole")
    assert_nothing_stray(tmp_path)


def assert_nothing_stray(folder: Path) -> None:
    assert [path.name for path in folder.iterdir()] == ["index"]
    left = {p.name for p in (folder / "index").rglob("*") if p.name.endswith((".tmp", ".lock", ".partial"))}
    assert left <= {".tantivy-meta.lock"}, "tantivy writes that one when it opens an index"
    assert not (folder / "index" / STATE).exists()


STEPS = """
import os, sys
from rexrag.retrieval.index.build import BuildOptions, build_index
corpus, out, restart = sys.argv[1], sys.argv[2], sys.argv[3] == "restart"
step, status = 0, 9
while status == 9:
    step += 1
    child = os.fork()
    if not child:
        left = step
        def counted(real):
            def call(*args, **kwargs):
                global left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), 9)
                return real(*args, **kwargs)
            return call
        for name in ("replace", "fsync", "mkdir", "unlink", "rmdir", "rename"):
            setattr(os, name, counted(getattr(os, name)))
        try:
            build_index(corpus, out, BuildOptions(), restart=restart)
            os._exit(0)
        except BaseException as error:
            print(type(error).__name__, error, flush=True)
            os._exit(1)
    status = os.waitpid(child, 0)[1]
print(status, step)
"""


@pytest.mark.parametrize("restart", ["go on", "restart"])
def test_a_kill_at_every_rename_sync_and_removal_is_survived(
    restart: str, corpus: Path, tmp_path: Path
) -> None:
    """Killed before the first such step, then before the second, …, each on top of what the last left."""
    out = tmp_path / "index"
    words = [sys.executable, "-c", STEPS, str(corpus), str(out), restart]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    status, steps = map(int, done.stdout.split())
    assert status == 0 and 5 < steps < 100
    load_index(out, verify=True)
    assert_nothing_stray(tmp_path)


def test_temporary_files_get_into_no_manifest(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    out, partial = tmp_path / "index", tmp_path / "index.partial"
    with monkeypatch.context() as patch:
        patch.setattr(build, "write_manifest", stop)
        with pytest.raises(KeyboardInterrupt):
            build_index(corpus, out, BuildOptions(kind="bm25-disk"))
    for name in (f".{STATE}.99999999-0123abcd.tmp", "ann.tmp", "ann.faiss.partial", "tantivy/.tmpAbC123"):
        (partial / name).write_text("half")
    build_index(corpus, out, BuildOptions(kind="bm25-disk"))
    listed = set(read_manifest(out)["files"])
    assert not [name for name in listed if "tmp" in name or "partial" in name]
    there = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert there == listed | {MANIFEST}


def test_a_build_killed_before_its_first_rename_is_known_again(corpus: Path, tmp_path: Path) -> None:
    for restart in (False, True):
        partial = tmp_path / "index.partial"
        partial.mkdir()
        (partial / f".{STATE}.99999999-0123abcd.tmp").write_text('{"asked"')
        build_index(corpus, tmp_path / "index", BuildOptions(), restart=restart)
        assert_nothing_stray(tmp_path)


def test_only_leavings_of_dead_processes_are_swept(tmp_path: Path) -> None:
    target = tmp_path / "index"
    mine, other = temporary_name(target), tmp_path / ".thesis.99999999-0123abcd.tmp"
    dead_file, dead_folder = (tmp_path / f".index.9999999{n}-0123abcd.tmp" for n in (8, 9))
    for folder in (mine, other, dead_folder):
        folder.mkdir()
        (folder / "x").touch()
    dead_file.touch()
    (tmp_path / ".index.notes.tmp").touch()
    assert is_temporary(mine) and not is_temporary(tmp_path / ".index.notes.tmp")
    sweep(target)
    assert {path.name for path in tmp_path.iterdir()} == {mine.name, other.name, ".index.notes.tmp"}


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        ValueError("An IO error occurred: 'No space left on device (os error 28)'"),
    ],
)
def test_a_full_disk_names_folder_written_and_free_and_the_build_goes_on(
    error: Exception, corpus: Path, tmp_path: Path
) -> None:
    def full(stage: str, done: int, total: int) -> None:
        if stage == "words":
            raise error

    options = BuildOptions(kind="bm25-disk")
    with pytest.raises(IndexFolderError) as caught:
        build_index(corpus, tmp_path / "index", options, full)
    said = str(caught.value)
    assert said.startswith(f"{tmp_path / 'index.partial'}: no space left on the disk: ")
    assert "MB are written" in said and "MB are free" in said and "\n" not in said
    stages: list[str] = []
    build_index(corpus, tmp_path / "index", options, lambda stage, done, total: stages.append(stage))
    assert "documents" not in stages, "what was written is kept"


def test_a_really_full_disk(corpus: Path, tmp_path: Path) -> None:
    """On a small file system of its own, where one can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=100k", "none", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        for kind in KINDS:
            done = rexrag("index", "build", corpus, "--out", disk / kind, "--kind", kind)
            assert done.returncode == 2 and "of disk are needed for the index" in done.stderr, done.stderr
            assert "0.0 GB" not in done.stderr
            with pytest.raises((IndexFolderError, OSError)) as caught:
                build_index(corpus, disk / kind, BuildOptions(kind=kind))
            assert isinstance(caught.value, IndexFolderError), caught.value
            assert "no space left on the disk" in str(caught.value)
            shutil.rmtree(disk / f"{kind}.partial")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_document_ids_that_look_like_paths_write_nothing_elsewhere(tmp_path: Path) -> None:
    write_jsonl(
        tmp_path / "c.jsonl", [{"id": "../../x", "contents": "kiln"}, {"id": "/etc/x", "contents": "y"}]
    )
    build_index(tmp_path / "c.jsonl", tmp_path / "index", BuildOptions())
    assert load_index(tmp_path / "index").search(["kiln"], 1)[0][0].id == "../../x"
    assert sorted(os.listdir(tmp_path)) == ["c.jsonl", "index"]
