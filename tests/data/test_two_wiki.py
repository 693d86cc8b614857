"""The rule for questions of 2WikiMultihopQA finds chains of evidence, and makes none up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rexrag.agent.prompts import cue_pool
from rexrag.config.schema import AgentConfig
from rexrag.data.questions import load_questions
from rexrag.data.two_wiki import clip, find_chain, question_demonstrations, shares
from rexrag.retrieval.corpus import read_corpus
from rexrag.retrieval.rankers.bm25 import BM25Retriever
from rexrag.training.sft import episode_setting
from rexrag.types import Question
from tests.support.fakes import CharCodec, document
from tests.support.replay import replay

FILM = document(
    "Night Train", "Night Train is a 1950 French film directed by Jean Roux and starring Ann Day."
)
DIRECTOR = document(
    "Jean Roux", "Jean Roux (3 May 1901 – 7 June 1970) was a French director. He was born in Lyon."
)
OTHER_FILM = document("Day Boat", "Day Boat is a 1962 American film directed by Bob Hill. It won a prize.")
OTHER_DIRECTOR = document("Bob Hill", "Bob Hill (born July 4, 1920) is an American director.")
CORPUS = [FILM, DIRECTOR, OTHER_FILM, OTHER_DIRECTOR, document("Ann Day", "Ann Day was a French actress.")]


def ask(text: str, *answers: str) -> Question:
    return Question(id=text, text=text, answers=answers)


@pytest.mark.parametrize(
    ("text", "answer", "queries"),
    [
        ("Where was the director of film Night Train born?", "Lyon", ["Night Train", "Jean Roux"]),
        ("Which film came out first, Night Train or Day Boat?", "Night Train", ["Night Train", "Day Boat"]),
        ("Which film was released more recently, Night Train or Day Boat?", "Day Boat",
         ["Night Train", "Day Boat"]),
        ("Which film has the director who was born later, Night Train or Day Boat?", "Day Boat",
         ["Night Train", "Jean Roux", "Day Boat", "Bob Hill"]),
        ("Who is older, Jean Roux or Bob Hill?", "Jean Roux", ["Jean Roux", "Bob Hill"]),
        ("Are Night Train and Day Boat from the same country?", "no", ["Night Train", "Day Boat"]),
    ],
)  # fmt: skip
def test_a_chain_is_found_by_rule_and_replays_to_the_right_answer(
    text: str, answer: str, queries: list[str]
) -> None:
    retriever = BM25Retriever.build(CORPUS)
    question = ask(text, answer)
    chain = find_chain(question, retriever, 3)
    assert chain is not None and chain.answer == answer
    assert [step.query for step in chain.steps] == queries
    titles = {d.title: d.text for d in CORPUS}
    for step in chain.steps:
        assert step.quote in titles[step.query], "every quote stands in the passage that was looked up"
    agent = AgentConfig(evidence_tokens=600, turn_tokens=900, total_tokens=9000)
    setting = episode_setting(CharCodec(), agent, topk=3)  # type: ignore[arg-type]
    demonstrations, share = question_demonstrations([question], retriever, setting)
    assert share == 1.0
    assert replay(demonstrations[0], question, setting.codec, agent, retriever, 3).em == 1.0


def test_a_chain_that_the_episode_cannot_hold_is_not_demonstrated() -> None:
    retriever = BM25Retriever.build(CORPUS)
    question = ask("Where was the director of film Night Train born?", "Lyon")
    roomy = AgentConfig(evidence_tokens=600, turn_tokens=900, total_tokens=9000)
    cases = [({}, 1), ({"search_turns": 1}, 0), ({"turn_tokens": 100}, 0), ({"evidence_tokens": 90}, 0)]
    for change, kept in cases:
        setting = episode_setting(CharCodec(), roomy.model_copy(update=change), topk=3)  # type: ignore[arg-type]
        assert len(question_demonstrations([question], retriever, setting)[0]) == kept, change


CHAIN_DOUBTS = [cue.removeprefix("<think> ") for cue in cue_pool("default_demo")]


@pytest.mark.parametrize("seed", range(8))
def test_a_recovered_chain_doubts_goes_on_and_is_right(seed: int) -> None:
    retriever = BM25Retriever.build(CORPUS)
    question = ask("Where was the director of film Night Train born?", "Lyon")
    agent = AgentConfig(evidence_tokens=600, turn_tokens=900, total_tokens=9000)
    setting = episode_setting(CharCodec(), agent, topk=3)  # type: ignore[arg-type]
    found, share = question_demonstrations([question], retriever, setting, 1.0, CHAIN_DOUBTS, seed)
    assert share == 1.0 and len(found) == 2
    straight, recovered = found
    assert set(straight.weights) == {0.0, 1.0} and 0.1 not in straight.weights
    assert replay(recovered, question, setting.codec, agent, retriever, 3).em == 1.0
    opened = recovered.weights.index(0.1)
    assert not any(recovered.weights[:opened]), "what leads up to the doubt is not trained on"
    text = setting.codec.decode(recovered.tokens[opened:])
    assert any(text.startswith(f"<think> {doubt} ") for doubt in CHAIN_DOUBTS)
    before = setting.codec.decode(recovered.tokens[:opened])
    early = "So the answer is Lyon." not in before
    assert ("<search>" in text) == early, "one that stopped early searches on, one that was right answers"
    assert question_demonstrations([question], retriever, setting, 0.0, CHAIN_DOUBTS)[0] == [straight]


@given(
    words=st.lists(st.sampled_from(["Ann", "was", "born,", "in", "Lyon"]), min_size=1, max_size=60),
    length=st.integers(1, 30),
    data=st.data(),
)
def test_a_clipped_quote_is_verbatim_and_keeps_its_key(words: list[str], length: int, data) -> None:
    sentence = " ".join(words)
    key = data.draw(st.sampled_from(words))
    quote = clip(sentence, key, length)
    assert quote in sentence and key in quote
    assert len(quote.split()) == min(length, len(words))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Which film came out first, Night Train or Day Boat?", "Day Boat"),  # the rule says Night Train
        ("Where was the director of film Day Boat born?", "Lyon"),  # no passage says so
        ("Where was the director of film Lost Reel born?", "Lyon"),  # no such passage
        ("Why?", "because"),
    ],
)
def test_no_chain_is_made_up(text: str, answer: str) -> None:
    assert find_chain(ask(text, answer), BM25Retriever.build(CORPUS), 3) is None


def test_chains_of_real_questions(shared) -> None:
    retriever = BM25Retriever.build(read_corpus(shared / "data" / "2wiki" / "corpus.jsonl"))
    questions = load_questions(shared / "data" / "2wiki" / "train.jsonl")[:120]
    found = shares(questions, retriever, 3)
    assert found["bridge"] > 0.6 and found["comparison"] > 0.55
    agent = AgentConfig(evidence_tokens=6000, turn_tokens=3000, total_tokens=60000)
    setting = episode_setting(CharCodec(), agent, topk=3)  # type: ignore[arg-type]
    kept = [q for q in questions if find_chain(q, retriever, 3) is not None]
    demonstrations, _ = question_demonstrations(kept, retriever, setting)
    for question, demonstration in zip(kept, demonstrations, strict=True):
        assert replay(demonstration, question, setting.codec, agent, retriever, 3).em == 1.0
