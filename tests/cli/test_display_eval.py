"""`rexrag eval` prints one table, whatever was evaluated; progress comes with every question."""

import io
import json
import re

import pytest
from rich.console import Console

from rexrag.cli import display_eval
from rexrag.cli.display_eval import EvalProgress, print_evaluation
from rexrag.config.schema import AgentConfig, Config, DataConfig
from rexrag.evaluation.cells import Choices, plan_evaluation
from rexrag.evaluation.policies import PolicySource
from rexrag.evaluation.runner import Options, run
from tests.support.fakes import ScriptedPolicy

AGENT = AgentConfig(template="terse", search_turns=2, turn_tokens=100, evidence_tokens=120, total_tokens=3000)


def say(question, turn, attempt):
    return f"<answer> {question.answers[0] if int(question.id) % 2 else 'no'} </answer>"


@pytest.fixture
def evaluate(tmp_path):
    def call(sources, strategies, out="out", observer=None, **options):
        rows = [
            {"id": i, "question": f"q{i}?", "answers": [f"a{i}"], "source": name}
            for name in sources
            for i in range(6)
        ]
        (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "c.jsonl").write_text('{"id": "1", "contents": "T\\na1 and a2"}\n')
        config = Config(agent=AGENT, data=DataConfig(corpus=str(tmp_path / "c.jsonl")))
        source = PolicySource("the [policy]", out, lambda: ScriptedPolicy(say))
        choices = Choices(data=[str(tmp_path / "q.jsonl")], strategies=strategies)
        made = plan_evaluation(source, config, choices, tmp_path / out)
        return run(made, Options(**options), observer) | {"out": str(tmp_path / out)}

    return call


def printed(result, width=80):
    console = Console(width=width, highlight=False, record=True, file=io.StringIO())
    print_evaluation(console, result)
    return console.export_text()


def label_lines(text):
    """Lines by what stands before their first number."""
    return {re.split(r" {2,}|(?<= )[–\d]", line.strip())[0].strip(): line for line in text.splitlines()}


def test_one_set_has_a_column_for_each_system(evaluate):
    text = printed(evaluate(["mine"], ["agent", "direct", "rag"]))
    lines = label_lines(text)
    assert text.count("───") and text.count("scores in percent") == 1
    assert [line.split() for line in text.splitlines() if "direct" in line] == [["agent", "direct", "rag"]]
    assert lines["EM"].split() == ["EM", "50.0", "50.0", "50.0"]
    assert lines["minus agent"].split()[2:] == ["–", "+0.0", "+0.0"]
    assert lines["ceiling"].split()[1] == lines["ceiling"].split()[3] and "–" in lines["ceiling"]
    assert "published" not in text and "failed" not in lines and "the [policy]" in text
    assert max(map(len, text.splitlines()[:-1])) <= 80


def test_several_sets_are_columns_with_their_average_beside_published_numbers(evaluate):
    text = printed(
        evaluate(["nq", "popqa", "bamboogle", "hotpotqa", "musique", "2wiki", "triviaqa"], ["agent"])
    )
    lines = label_lines(text)
    assert lines["EM"].split()[1:] == ["50.0"] * 8 and len(lines["low"].split()) == 1 + 8
    assert next(line for line in text.splitlines() if "REX-RAG 3B" in line).split()[2:] == [
        "43.9",
        "60.4",
        "44.2",
        "37.4",
        "39.7",
        "14.5",
        "31.2",
        "38.7",
    ]
    assert "not comparable, every set: corpus of 1 passages" in text.replace("\n", " ")
    assert max(map(len, text.splitlines()[:-1])) <= 80


def test_several_sets_and_systems_are_blocks_of_one_table(evaluate):
    text = printed(evaluate(["nq", "popqa"], ["agent", "rag"]))
    assert text.count("scores in percent") == 1 and text.count("  EM  ") == 2
    assert "minus agent" in text and "tokens in" not in text


def test_another_evaluation_is_named_below_the_table(evaluate, tmp_path):
    evaluate(["mine"], ["agent"], "before")
    text = printed(evaluate(["mine"], ["agent"], against=(tmp_path / "before",)), 200)
    assert "minus [1]" in text and f"[1] agent of {tmp_path}/before" in text


def test_a_line_now_and_then_says_how_far_it_is_where_the_output_is_no_terminal(evaluate, monkeypatch):
    monkeypatch.setattr(display_eval, "QUIET_SECONDS", -1.0)
    console = Console(width=80, highlight=False, record=True, file=io.StringIO())
    evaluate(["mine"], ["agent"], observer=EvalProgress(console), audit=False)
    lines = console.export_text().splitlines()
    assert [line.split()[0] for line in lines] == [f"{i}/6" for i in range(1, 7)]
    assert all("eta" in line and "mine agent  EM" in line for line in lines) and max(map(len, lines)) <= 80
