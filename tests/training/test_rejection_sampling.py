"""What is imitated of a policy's own rollouts: right ones, without notices, at most k of a question."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rexrag.agent.episode import Episode
from rexrag.agent.protocols.tags import NOTICE
from rexrag.config.schema import AgentConfig
from rexrag.training.rejection_sampling import (
    RejectionSampling,
    choose,
    draw_demonstrations,
    without_notices,
)
from rexrag.types import Question, Rollout
from tests.support.fakes import CharCodec, FakeRetriever, ScriptedPolicy, document
from tests.support.replay import replay

AGENT = AgentConfig(template="terse", search_turns=5, turn_tokens=60, evidence_tokens=90, total_tokens=3000)
FOUND = {"a": [document("A", "It is x.")], "b": [document("B", "It is y.")]}
SEARCH_A, SEARCH_B = "<think> ? </think> <search> a </search>", "<search> b </search>"
RIGHT, WRONG = "<think> ! </think> <answer> x </answer>", "<answer> y </answer>"
INVALID = ("<think> I am done </think>", "x" * 70, "<search> never closed", "")


def question(name: str = "q") -> Question:
    return Question(name, f"What is {name}?", ("x",))


def rollout_of(turns: list[str], agent: AgentConfig = AGENT) -> Rollout:
    policy = ScriptedPolicy(lambda asked, turn, attempt: turns[turn])
    episode = Episode(question(), policy.codec, agent, 1)
    policy.session().run([episode], FakeRetriever(FOUND), 1.0, 0)
    return episode.rollout()


@given(
    valid=st.lists(st.sampled_from([SEARCH_A, SEARCH_B]), max_size=2),
    invalid=st.lists(st.tuples(st.integers(0, 2), st.sampled_from(INVALID)), max_size=3),
)
def test_without_invalid_turns_the_rest_is_the_rollout_that_never_had_them(valid, invalid) -> None:
    turns = [*valid, RIGHT]
    for place, said in invalid:
        turns.insert(min(place, len(turns) - 1), said)
    rollout = rollout_of(turns)
    assert rollout.em == 1.0 and rollout.text.count(NOTICE) == len(invalid)
    demonstration = without_notices(rollout)
    clean = rollout_of([*valid, RIGHT])
    assert demonstration.tokens == clean.tokens and demonstration.origins == clean.origins
    again = replay(demonstration, question(), CharCodec(), AGENT, FakeRetriever(FOUND), 1)
    assert again.em == 1.0
    said = [t for t, w in zip(demonstration.tokens, demonstration.weights, strict=True) if w == 1.0]
    assert CharCodec().decode(said) == "".join([*valid, RIGHT]), "evidence is masked, the rest is trained on"
    assert set(demonstration.weights) <= {0.0, 1.0}


def test_a_forced_last_turn_that_answers_right_is_kept() -> None:
    agent = AGENT.model_copy(update={"search_turns": 1})
    rollout = rollout_of([SEARCH_A, RIGHT], agent)
    assert rollout.forced_last_turn and without_notices(rollout).tokens == rollout.tokens


def test_wrong_equal_and_surplus_rollouts_are_not_chosen() -> None:
    rollouts = [
        rollout_of([SEARCH_B, WRONG]),
        rollout_of([SEARCH_A, RIGHT]),
        rollout_of([INVALID[0], SEARCH_A, RIGHT]),  # the same once its invalid turn is gone
        rollout_of([*[INVALID[0]] * 6]),
        rollout_of([RIGHT]),
        rollout_of([SEARCH_B, RIGHT]),
    ]
    tokens = [rollouts[i].tokens for i in (1, 4, 5)]
    assert [row.tokens for row in choose(rollouts, 5)] == tokens
    assert [row.tokens for row in choose(rollouts, 2)] == tokens[:2]
    assert choose(rollouts[:1], 2) == []


def test_a_round_counts_what_it_drew_over_all_batches() -> None:
    def script(asked: Question, turn: int, attempt: int) -> str:
        if asked.id == "never":
            return INVALID[0]
        return (RIGHT, WRONG)[attempt % 2] if turn else (SEARCH_A, INVALID[0])[attempt // 2 % 2]

    policy = ScriptedPolicy(script)
    questions = [question(f"q{i}") for i in range(40)] + [question("never")]
    amount = RejectionSampling(rollouts=4, per_question=3)
    drawn = draw_demonstrations(policy, questions, FakeRetriever(FOUND), AGENT, 1, amount, 7)
    # Right: search and answer; answer alone, after a notice that is cleaned away.
    assert drawn.figures() == {
        "questions": 41, "rollouts": 164, "right": round(80 / 164, 4), "unanswered": round(4 / 164, 4),
        "first_turn_valid": round(80 / 164, 4), "demonstrations": 80,
    }  # fmt: skip
    assert [asked.id for asked, _ in drawn.rows[:3]] == ["q0", "q0", "q1"]
    assert all(session.closed for session in policy.sessions) and len(policy.sessions) == 3
    assert len({session.seeds[0] for session in policy.sessions}) == 3, "each batch has a seed of its own"


def test_progress_is_said_where_there_is_no_terminal(monkeypatch, capsys) -> None:
    monkeypatch.setattr("rexrag.training.rejection_sampling.QUIET_SECONDS", -1.0)
    policy = ScriptedPolicy(lambda asked, turn, attempt: RIGHT)
    amount = RejectionSampling(rollouts=64)
    draw_demonstrations(policy, [question("a"), question("b")], FakeRetriever(), AGENT, 1, amount, 0)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 128, "one for each rollout, not for each batch"
    assert lines[0].startswith("rollouts: 1/128  eta ")
    assert lines[-1] == "rollouts: 128/128  64/64 right  eta 0 s"


@pytest.mark.parametrize("rollouts", [1, 5, 100])
def test_every_question_is_asked_as_often_as_it_should_be(rollouts: int) -> None:
    policy = ScriptedPolicy(lambda asked, turn, attempt: RIGHT)
    questions = [question(f"q{i}") for i in range(7)]
    amount = RejectionSampling(rollouts=rollouts)
    draw_demonstrations(policy, questions, FakeRetriever(), AGENT, 1, amount, 0)
    assert policy.attempts == {asked.group: rollouts for asked in questions}
