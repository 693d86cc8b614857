"""An instruction template in a text file: every command takes it, and notices that it changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.test_cli import refused, run

__all__ = ["run"]
TINY = (
    "policy.path=tiny-easy",
    "policy.device=cpu",
    "train.threads=1",
    "data.dev_limit=2",
    "train.control=''",
)
STEP = (
    "train.steps=1",
    "train.questions=2",
    "train.evals=0",
    "train.max_generated=0",
    "data.world_questions=20",
)


@pytest.fixture
def template(tmp_path) -> Path:
    file = tmp_path / "mine.txt"
    file.write_text("Question: {question}")
    return file


def settings(template: Path, *more: str) -> list[str]:
    return [word for pair in (*TINY, *more, f"agent.template={template}") for word in ("--set", pair)]


def test_a_run_goes_on_only_with_the_text_that_it_began_with(run, tmp_path, template) -> None:
    out = tmp_path / "run"
    assert run("train", "quickstart", *settings(template, *STEP), "--out", out)[0] == 0
    template.write_text("Answer this: {question}")
    refused(run("train", "--resume", "--out", out, "--set", "train.steps=2"), "template")
    template.write_text("Question: {question}")
    assert run("train", "--resume", "--out", out, "--set", "train.steps=2")[0] == 0


def test_an_evaluation_asks_again_once_the_text_has_changed(run, tmp_path, template) -> None:
    out = tmp_path / "eval"
    arguments = ("eval", "quickstart", *settings(template), "--policy", "tiny-easy", "--out", out)
    assert run(*arguments)[0] == 0
    (cell,) = (out / "cells").iterdir()
    template.write_text("Answer this: {question}")
    assert run(*arguments)[0] == 0
    assert len(list((out / "cells").iterdir())) == 2 and cell.is_dir()


@pytest.mark.parametrize("command", ["train", "eval", "warmup"])
def test_a_file_that_is_no_template_is_one_line(run, tmp_path, template, command) -> None:
    template.write_text("Answer this.")
    more = ("--from-rollouts",) if command == "warmup" else ()
    result = run(command, "quickstart", *more, *settings(template), "--out", tmp_path / "out")
    refused(result, "mine.txt: no {question} here; expected an instruction with {question}")
    assert not (tmp_path / "out" / "config.toml").exists()
