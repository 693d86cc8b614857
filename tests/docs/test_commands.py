"""Every command of README, CONTRIBUTING and the docs: known, parsed, and run where this machine can.

`how.HOW` says of each command how it is run, with smaller numbers, or why it is not. A command that is not in
the table fails, and so does an entry that no page has.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import typer

from rexrag.cli import app, main
from rexrag.config import presets
from rexrag.data.world.generator import World
from rexrag.io import write_jsonl
from tests.docs.how import HOW, RETRIEVER, SMALL, Run
from tests.docs.pages import HAND_WRITTEN, ROOT, commands

GIVEN = sorted({command for page in HAND_WRITTEN for command in commands(page)})


def test_the_table_has_every_command_and_no_other():
    assert set(GIVEN) - set(HOW) == set(), "commands without an entry"
    assert set(HOW) - set(GIVEN) == set(), "entries that no page has"


@pytest.mark.parametrize("command", GIVEN)
def test_a_command_can_be_parsed(command, workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    words = shlex.split(re.sub(r"^(?:[A-Z_]+=\S+ )+", "", command))
    program, rest = words[0], words[1:]
    if program == "rexrag":
        parse_ours(rest)
    elif program == "make":
        made = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^{rest[0]}:", made, re.MULTILINE), f"no target {rest[0]}"
    elif program == "pip":
        check_extras(rest)
    elif program == "python" and rest[0].endswith(".py"):
        knows(ROOT / rest[0], rest[1:])
    elif program in ("pytest", "cp"):
        for word in rest[:1]:
            assert (workspace / word).exists(), word


def parse_ours(words: Sequence[str]) -> None:
    """Parse as the command line would; then the settings, so that an unknown key fails too."""
    command: Any = typer.main.get_command(app)
    context, name, rest = None, "rexrag", list(words)
    while True:
        context = command.make_context(name, rest, parent=context)
        if not hasattr(command, "commands"):
            break
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
    given = context.params
    if "override" in given and name in ("train", "compare", "warmup"):
        algorithm = given.get("algorithm") or given.get("arm") or ""
        for one in (given.get("arms") or algorithm).split(","):
            presets.resolve(given.get("config"), one, given["override"] or [])


def check_extras(words: Sequence[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    for word in words:
        if found := re.fullmatch(r"\.\[(.*)\]", word):
            assert set(found.group(1).split(",")) <= set(extras), word


def knows(script: Path, words: Sequence[str]) -> None:
    """Does the script's source name each option? Importing it could need what is not installed."""
    assert script.is_file(), script
    source = script.read_text(encoding="utf-8")
    source += (
        (script.parent / "common.py").read_text(encoding="utf-8")
        if script.parent.name == "benchmarks"
        else ""
    )
    for word in words:
        assert not word.startswith("--") or f'"{word}"' in source, f"{script.name} has no {word}"


@pytest.fixture(scope="session")
def workspace(tmp_path_factory) -> Path:
    """A folder with the files that the pages name, made from a small fictional world."""
    folder = tmp_path_factory.mktemp("pages")
    for name in ("benchmarks", "configs", "examples", "experiments", "tests"):
        if (ROOT / name).exists():
            (folder / name).symlink_to(ROOT / name)
    world = World(3, 40)
    write_jsonl(
        folder / "corpus.jsonl",
        [{"id": d.id, "title": d.title, "text": d.text} for d in world.documents],
    )
    for split, name, count in (("train", "train", 40), ("held-out", "dev", 12)):
        rows = [{"question": q.text, "answers": list(q.answers)} for q in world.questions(split, count)]
        write_jsonl(folder / f"{name}.jsonl", rows)
    steps = "<think> i look </think><search> {0} </search><information> {0} </information>"
    steps += "<think> so </think><answer> {0} </answer>"
    demos = [{"question": f"Who is {name}?", "trace": steps.format(name)} for name in ("theo greco", "clara")]
    write_jsonl(folder / "demos.jsonl", demos)
    (folder / "doubts.txt").write_text("<think> i am not sure yet\n<think> let me look again\n")
    trace = "<think> who? </think> <answer> theo greco </answer>"
    write_jsonl(folder / "traces.jsonl", [{"question": "Who?", "answers": ["Theo Greco"], "response": trace}])
    shutil.copy(ROOT / "configs" / "own-data.toml", folder / "mine.toml")
    return folder


@pytest.fixture(scope="session")
def trained(workspace) -> Path:
    """The workspace with a small quickstart, an index and the run folders that later commands name."""
    for command in (
        f"rexrag train --out runs/quickstart{SMALL} --set train.control=",
        "rexrag model export runs/quickstart --out models/copy",
        "rexrag index build corpus.jsonl --out indexes/wiki",
    ):
        finished = call(command, workspace)
        assert finished.returncode == 0, finished.stderr
    return workspace


def call(command: str, folder: Path, apart: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a command: ours in this process, since importing takes longer than most of them.

    apart: in one of its own, as other programs are; a client's connections end with it.
    """
    words = shlex.split(command)
    if apart or words[0] != "rexrag":
        return subprocess.run(
            [*START[words[0]], *words[1:]],
            cwd=folder,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=600,
        )
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder)
        patch.setattr(sys, "argv", words)
        patch.syspath_prepend(str(folder))
        for name, value in environment().items():
            patch.setenv(name, value)
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


START = {
    "rexrag": [sys.executable, "-m", "rexrag"],
    "python": [sys.executable],
    "cp": ["cp"],
    "curl": ["curl", "--fail"],
}


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}


RUNNABLE = [command for command, how in HOW.items() if isinstance(how, Run)]
"""In the order of the pages: some name what an earlier one has written."""


@pytest.mark.slow
@pytest.mark.parametrize("command", RUNNABLE)
def test_a_command_runs(command, trained, request):
    how = HOW[command]
    assert isinstance(how, Run)
    text = f"{command} {how.more}"
    for old, new in how.swaps:
        assert old in text, f"{old} is not in the command"
        text = text.replace(old, new)
    if how.serves:
        with serving(text, trained):
            return
    if how.asks:
        text = text.replace(RETRIEVER, request.getfixturevalue("retriever"))
    finished = call(text, trained, apart=how.asks)
    assert finished.returncode == 0, f"{text}\n{finished.stdout[-2000:]}\n{finished.stderr[-2000:]}"


@contextmanager
def serving(text: str, folder: Path) -> Iterator[str]:
    """Start a service, hand over the address that it prints, stop it as a user would."""
    words = shlex.split(text)
    process = subprocess.Popen(
        [*START[words[0]], *words[1:]],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    try:
        seen = ""
        while (found := re.search(r"http://127\.0\.0\.1:\d+", seen)) is None:
            line = process.stdout.readline()
            assert line, f"ended early: {seen}"
            seen += line
        yield found.group()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) in (0, 130)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="session")
def retriever(trained) -> Iterator[str]:
    """The address of a served index."""
    with serving("rexrag serve indexes/wiki --port 0", trained) as address:
        yield address


def test_the_workspace_has_what_the_pages_promise(workspace):
    rows = [json.loads(line) for line in (workspace / "dev.jsonl").read_text().splitlines()]
    assert rows and set(rows[0]) == {"question", "answers"}
