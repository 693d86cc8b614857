"""The progress of an index build, as a terminal and as a log show it."""

import io

import pytest
from rich.console import Console

from rexrag.cli import display as show
from rexrag.cli.display import BuildProgress


def test_a_terminal_sees_every_stage_finished_with_its_real_count() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, color_system=None)
    with BuildProgress(console) as progress:
        for done in range(1, 5001):
            progress("documents", done, 4900)  # the estimate was too low
        for done in range(1, 5001):
            progress("words", done, 5000)
        progress("checking", 0, 3)
        progress("checking", 3, 3)
        drawn = [task.completed for task in progress.live.tasks]  # type: ignore[union-attr]
    assert drawn == [5000, 5000, 3]
    documents, words, checking = [row for row in screen.getvalue().split("\n") if " eta " in row][-3:]
    assert "copy passages" in documents and " 5,000/5,000 " in documents
    assert "index words" in words and " 5,000/5,000 " in words
    assert "check files" in checking and " 3/3 " in checking


def test_an_estimate_that_was_too_high_does_not_stay() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with BuildProgress(console) as progress:
        progress("documents", 1, 9000)
        progress("documents", 5000, 9000)
        progress("vectors", 1024, 5000)
        first = progress.live.tasks[0]  # type: ignore[union-attr]
        assert (first.completed, first.total) == (5000, 5000)


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    now = [0.0]
    monkeypatch.setattr(show.time, "monotonic", lambda: now[0])
    with BuildProgress(Console(file=log)) as progress:
        for done in range(100, 3100, 100):  # resumed at 100; a second each
            now[0] += 1.0
            progress("vectors", done, 3000)
    lines = log.getvalue().splitlines()
    assert lines == ["encode passages: 1,100/3,000  eta 19 s", "encode passages: 2,200/3,000  eta 8 s"]
