"""The `warmup` command: its three ways, and what it says about options that do not go together."""

from __future__ import annotations

import json

import pytest

from tests.cli.test_cli import refused, run

__all__ = ["run"]
SETTINGS = ("policy.path=tiny-easy", "policy.device=cpu", "train.threads=1", "data.world_questions=20")
TINY = [word for setting in SETTINGS for word in ("--set", setting)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ("--demonstrations FILE", "--from-rollouts", "2WikiMultihopQA")),
        (["quickstart", "--rounds", "2"], ("--rounds: only with --from-rollouts",)),
        (["--demonstrations", "x.jsonl", "--per-question", "2"], ("--per-question: only with",)),
        (["--demonstrations", "x.jsonl", "--from-rollouts"], ("give one of them",)),
        (["quickstart", "--demonstrations", "missing.jsonl", *TINY], ("missing.jsonl: no such file",)),
        (["--from-rollouts", "--set", "data.train=missing.jsonl"], ("missing.jsonl: no such file",)),
        (["--from-rollouts", "--set", "agent.template=serch-first"], ("serch-first",)),
    ],
)
def test_a_mistake_is_one_line(run, tmp_path, monkeypatch, arguments, words) -> None:
    monkeypatch.chdir(tmp_path)
    refused(run("warmup", *arguments, "--out", tmp_path / "m"), *words)
    assert not (tmp_path / "m").exists()


def test_help_says_what_the_rule_is_for_and_shows_each_way(run) -> None:
    code, out, _ = run("warmup", "--help")
    assert code == 0
    text = " ".join(out.split())
    assert "a rule makes them for questions of 2WikiMultihopQA" in text
    assert "rexrag warmup --demonstrations demos.jsonl" in text and "rexrag warmup --from-rollouts" in text


def test_rows_that_cannot_be_converted_are_named_one_a_line_and_counted(run, tmp_path) -> None:
    row = json.dumps({"question": "who ?", "trace": "<answer> right one </answer>"})
    (tmp_path / "own.jsonl").write_text("\n".join([row, *["{}"] * 12]) + "\n")
    arguments = ("quickstart", "--demonstrations", tmp_path / "own.jsonl", *TINY)
    code, out, err = run("warmup", *arguments, "--out", tmp_path / "m")
    assert code == 0 and "refused                  12" in out and "demonstrations           1\n" in out
    lines = [line for line in err.splitlines() if line.startswith("left out: ")]
    assert len(lines) == 11 and lines[-1] == "left out: 2 more rows"
    assert f"{tmp_path / 'own.jsonl'}, row 2, field 'trace': missing; expected" in lines[0]


def test_rounds_are_printed_and_as_json(run, tmp_path) -> None:
    amount = ("--from-rollouts", "--questions", 6, "--rollouts", 3, "--per-question", 1, "--seed", 3)
    code, out, _ = run("warmup", "quickstart", *amount, *TINY, "--out", tmp_path / "m")
    assert code == 0 and "round                    1" in out and "unanswered" in out
    code, out, _ = run("warmup", "quickstart", *amount, *TINY, "--out", tmp_path / "j", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["seed"] == 3 and facts["rounds"][0]["rollouts"] == 18
