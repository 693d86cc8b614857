"""Diagnosis of a scripted policy whose failings are known."""

import pytest

from rexrag.config.files import parse_config
from rexrag.experiments import diagnosis
from rexrag.stats import share
from rexrag.types import Question
from tests.support.fakes import FakeRetriever, ScriptedPolicy, document

EASY = [Question(f"easy-{i}", "Easy", ("yes",)) for i in range(3)]
HARD = [Question(f"hard-{i}", "Hard", ("Oslo",)) for i in range(4)]
SAMPLED = 3
"""Attempts 0 … 2 of a question: one greedy, two sampled; later ones are continuations."""


def script(question, turn, attempt):
    if question.id.startswith("easy"):
        return (
            "<think>sure</think><answer>yes</answer>" if attempt < SAMPLED else "</think><answer>no</answer>"
        )
    if attempt < SAMPLED:
        doubts = "</think><think>hm" if question.id == "hard-0" else ""
        return f"<think>a guess{doubts}</think><answer>Rome</answer>"
    if attempt < SAMPLED + 2:  # without a cue: the variants run one after the other
        return "<answer>Rome</answer>"
    return "</think><search>hard</search>" if turn == 0 else "<think>so</think><answer>Oslo</answer>"


def test_diagnosis_of_a_policy_that_needs_cues():
    config = parse_config({}, ["agent.template=terse", "agent.cues=tiny"])
    policy = ScriptedPolicy(script)
    retriever = FakeRetriever({"hard": [document("Oslo", "the answer")]})
    seen = diagnosis.observe(policy, retriever, [*EASY, *HARD], config)
    figures = diagnosis.describe(seen, policy)
    shares = {name: (figure["value"], figure["n"]) for name, figure in figures.items()}
    assert shares["greedy EM"] == (3 / 7, 7)
    assert shares["hard questions: right by chance"] == (0.0, 8)
    assert shares["other questions: right"] == (1.0, 6)
    assert shares["dead ends"] == (8 / 14, 14)
    assert shares["second thoughts without a cue"] == (2 / 14, 14)
    assert shares["dead ends recovered: without a cue"] == (0.0, 8)
    assert shares["dead ends recovered: with a cue of the pool"] == (1.0, 8)
    assert shares["right answers that stay right after a cue"] == (0.0, 6)
    assert "AUC of mean cue log-prob for success" not in figures, "all succeed: nothing to tell apart"
    assert len(diagnosis.lines(figures)) == len(figures)
    assert all(session.closed for session in policy.sessions)


def test_hard_can_be_said_by_the_data():
    config = parse_config({}, ["agent.template=terse", "agent.cues=none"])
    policy = ScriptedPolicy(script)
    seen = diagnosis.observe(policy, FakeRetriever({}), [*EASY, *HARD], config)
    figures = diagnosis.describe(seen, policy, lambda question: question.id == "easy-0")
    assert figures["hard questions: right by chance"]["n"] == 2
    assert "right answers that stay right after a cue" not in figures and set(seen.probes) == {
        diagnosis.WITHOUT_CUE
    }


def test_share_is_wilson_s_interval():
    got = share(1, 10)
    assert (got["value"], got["n"]) == (0.1, 10)
    assert got["low"] == pytest.approx(0.0179, abs=1e-4) and got["high"] == pytest.approx(0.4042, abs=1e-4)
    assert share(0, 0) == {"value": 0.0, "low": 0.0, "high": 1.0, "n": 0}
