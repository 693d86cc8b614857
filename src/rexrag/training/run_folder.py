"""The run folder: what a report or a resume needs, and nothing half-written.

    config.toml · environment.json · metrics.jsonl · eval.jsonl · rollouts.jsonl.zst · summary.json
    checkpoints/step-N/ (safetensors, state.json, a digest for each file)

`config-to-step-N.toml` holds the settings up to step N, where a resume changed them. Rows are only added to
the logs. A checkpoint records their lengths, so that a resume can cut off the rows written after it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import zstandard

from rexrag import __version__
from rexrag.config.files import dump_toml, load_config
from rexrag.config.schema import Config
from rexrag.errors import CheckpointError, ConfigError, RunFolderError
from rexrag.io import atomic_folder, json_line, sha256_file, write_json, write_text

LOGS = ("metrics.jsonl", "eval.jsonl", "rollouts.jsonl.zst")
UNSAVED = (*LOGS, "environment.json")
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "bm25s", "pydantic", "peft")


@contextmanager
def open_run(folder: Path, config: Config, *, resume: bool, restart: bool = False) -> Iterator[None]:
    """Make a run folder, or open one to resume, and lock it until the block ends.

    restart: remove what a run left that had saved no checkpoint. Raises RunFolderError with one line; a
    folder that is refused is not changed.
    """
    if resume:
        check_resumable(folder)
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"{folder}: a file stands there; choose another --out")
    with _errors_in_one_line(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with held(folder):
        if restart:
            _clear(folder)
        elif not resume and any(folder.iterdir()) and not _is_cleared(folder):
            raise RunFolderError(f"{folder} is not empty; pass --resume to continue it, or another --out")
        if not resume:
            with _errors_in_one_line(folder):
                write_text(folder / "config.toml", dump_toml(config))
        yield


@contextmanager
def _errors_in_one_line(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunFolderError(f"{folder}: cannot be written: {error.strerror or error}") from None


def check_resumable(folder: Path) -> None:
    """Raises RunFolderError where the folder holds no run."""
    if not (folder / "config.toml").is_file():
        raise RunFolderError(f"{folder}: no run to resume there (it has no config.toml)")


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Lock a run folder for this process until the block ends. Raises RunFolderError where another has it.

    The operating system holds the lock, on the folder itself, so nothing is left behind by a kill. There is
    none on Windows and on file systems without such locks (NFS).
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunFolderError(f"{folder}: another process is training there; let it end first") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)


def has_checkpoint(folder: Path) -> bool:
    """Is there a checkpoint, of either engine? One that a kill left half-written does not count."""
    return any(not path.name.startswith(".") for path in (folder / "checkpoints").glob("*step*"))


def _is_cleared(folder: Path) -> bool:
    """Does the folder hold nothing but the config.toml that a run without a checkpoint wrote?"""
    file = folder / "config.toml"
    saved = has_checkpoint(folder) or (folder / "summary.json").exists()
    if saved or any((folder / name).exists() for name in UNSAVED) or not file.is_file():
        return False
    try:
        return dump_toml(load_config(file)) == file.read_text(encoding="utf-8")
    except (ConfigError, UnicodeDecodeError):
        return False


def clear_unsaved(folder: Path) -> None:
    """Remove what a run wrote before its first checkpoint, so that it can begin again.

    `config.toml` stays until the new one replaces it, and so does every file that no run writes. Raises
    RunFolderError where the run is still going, or is over and its checkpoints are gone.
    """
    if folder.is_dir():
        with held(folder):
            _clear(folder)


def _clear(folder: Path) -> None:
    if has_checkpoint(folder):
        return
    if (folder / "summary.json").exists():
        raise RunFolderError(f"{folder}: this run is over and has no checkpoint; choose another --out")
    for name in UNSAVED:
        (folder / name).unlink(missing_ok=True)
    for left in (folder / "checkpoints").glob(".*"):  # a half-written checkpoint
        shutil.rmtree(left, ignore_errors=True)
    for name in ("tensorboard", "verl"):
        shutil.rmtree(folder / name, ignore_errors=True)


def follow_config(folder: Path, config: Config, step: int) -> None:
    """Write the settings of a resumed run to `config.toml`; those up to `step`, if others, stay beside it."""
    file = folder / "config.toml"
    before, now = file.read_text(encoding="utf-8"), dump_toml(config)
    if now != before:
        write_text(folder / f"config-to-step-{step}.toml", before)
        write_text(file, now)


def free_folder(name: str, parent: Path = Path("runs")) -> Path:
    """`runs/name`, or `runs/name-2`, `-3` … where that is taken."""
    name = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "run"
    folder, number = parent / name, 1
    while folder.exists():
        number += 1
        folder = parent / f"{name}-{number}"
    return folder


def environment(**digests: str) -> dict[str, Any]:
    """Versions and digests on which a run's numbers depend."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "rexrag": __version__,
        "commit": _commit(),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        **versions,
        **digests,
    }


def _commit() -> str:
    """The commit of the source tree that runs, "+" where it was changed; "" for an installed package."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return ""
    try:
        said = [
            subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
            ).stdout
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        ]
    except (OSError, subprocess.CalledProcessError):
        return ""
    return said[0].strip() + ("+" if said[1].strip() else "")


def append(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows to a log; in a `.zst` log every call writes one whole frame."""
    data = b"".join(json_line(row) for row in rows)
    if file.suffix == ".zst":
        data = zstandard.ZstdCompressor().compress(data)
    with file.open("ab") as out:
        out.write(data)


def last_row(file: Path) -> dict[str, Any]:
    """The newest row of a log that is not compressed. Raises RunFolderError where there is none."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    if not lines:
        raise RunFolderError(f"{file}: no step was made")
    row: dict[str, Any] = json.loads(lines[-1])
    return row


def save_checkpoint(
    run: Path, step: int, save: Callable[[Path], None], state: Mapping[str, Any], keep: int
) -> Path:
    """Write `checkpoints/step-N`, whole or not at all, and remove all but the `keep` newest.

    save: writes the learner into a folder. state: what else a resume needs.
    """
    folder = run / "checkpoints" / f"step-{step}"
    sizes = {name: (run / name).stat().st_size for name in LOGS if (run / name).exists()}
    for left in folder.parent.glob(".step-*.tmp"):  # by a kill in the middle of an earlier save
        shutil.rmtree(left, ignore_errors=True)
    with atomic_folder(folder) as fresh:
        save(fresh)
        write_json(fresh / "state.json", {**state, "step": step, "logs": sizes})
        files = sorted(path for path in fresh.rglob("*") if path.is_file())
        write_json(fresh / "digests.json", {str(f.relative_to(fresh)): sha256_file(f) for f in files})
    for _, old in _checkpoints(run)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def last_checkpoint(run: Path) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint whose digests hold, and its state. Raises CheckpointError where none does."""
    damaged = []
    for _, folder in _checkpoints(run):
        reason = _damage(folder)
        if reason is None:
            state: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            return folder, state
        damaged.append(f"{folder.name} ({reason})")
    found = f"none of its checkpoints is whole: {', '.join(damaged)}" if damaged else "it has no checkpoint"
    raise CheckpointError(f"{run}: {found}")


def truncate_logs(run: Path, sizes: Mapping[str, int]) -> None:
    """Cut every log back to its length (bytes) at the checkpoint."""
    for name in LOGS:
        file = run / name
        if file.exists():
            os.truncate(file, min(sizes.get(name, 0), file.stat().st_size))


def digest(*parts: object) -> str:
    """SHA-256 over several digests or names, in hexadecimal."""
    return hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()


def _checkpoints(run: Path) -> list[tuple[int, Path]]:
    """(step, folder), newest first."""
    folder = run / "checkpoints"
    found = [path for path in folder.glob("step-*") if path.name[5:].isdigit()] if folder.is_dir() else []
    return sorted(((int(path.name[5:]), path) for path in found), reverse=True)


def _damage(folder: Path) -> str | None:
    """Why a checkpoint cannot be used; None where it is whole."""
    try:
        digests = json.loads((folder / "digests.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "no readable digests.json"
    for name, expected in digests.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if sha256_file(file) != expected:
            return f"{name} has changed"
    return None if "state.json" in digests else "no state.json"
