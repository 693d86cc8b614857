"""Demonstrations are what an episode would have written, and habits and recoveries are what they claim."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rexrag.agent.codec import HFCodec
from rexrag.agent.episode import Episode, State
from rexrag.agent.prompts import cue_pool
from rexrag.config.schema import AgentConfig
from rexrag.data.demonstrations import (
    HARD_KINDS,
    Demonstration,
    Setting,
    graded_habits,
    habit_draft,
    habits,
    lookalikes,
    recovery_draft,
    world_drafts,
    write,
)
from rexrag.data.questions import load_questions
from rexrag.data.two_wiki import clip, find_chain, question_demonstrations, shares
from rexrag.data.world.generator import KINDS, World
from rexrag.retrieval.corpus import read_corpus
from rexrag.retrieval.rankers.bm25 import BM25Retriever
from rexrag.training.make_checkpoint import EMBEDDED_AGENT, embedded_tokenizer
from rexrag.training.sft import episode_setting
from rexrag.types import Origin, Question, Rollout
from tests.support.fakes import CharCodec, document

DOUBTS = [cue.removeprefix("<think> ") for cue in cue_pool("tiny_demo")]
SEEDS = st.integers(0, 10**6)


@pytest.fixture(scope="module")
def setting() -> Setting:
    return episode_setting(HFCodec(embedded_tokenizer()), EMBEDDED_AGENT, topk=2)


def replay(
    demonstration: Demonstration, question: Question, setting: Setting, retriever, agent: AgentConfig
) -> Rollout:
    """Feed the demonstration's own tokens to a real episode; the episode inserts the evidence."""
    episode = Episode(question, setting.codec, agent, setting.topk)
    assert episode.prompt == demonstration.prompt
    own = (t for t, o in zip(demonstration.tokens, demonstration.origins, strict=True) if o == Origin.POLICY)
    while episode.state is not State.DONE:
        if episode.state is State.SEARCH:
            episode.found(retriever.search([episode.query], setting.topk)[0])
        elif episode.state is State.FORCED:
            episode.take_forced([0.0] * len(episode.forced))
        else:
            episode.sampled(next(own), -1.0)
    assert next(own, None) is None
    rollout = episode.rollout()
    assert rollout.tokens == demonstration.tokens
    assert rollout.origins == demonstration.origins
    return rollout


@given(seed=SEEDS)
@settings(max_examples=10, deadline=None)
def test_an_episode_would_have_inserted_the_same_evidence(setting: Setting, seed: int) -> None:
    world = World(seed)
    retriever = BM25Retriever.build(world.documents)
    rng = random.Random(seed)
    for make_recovery in (False, True):
        items = [world.draw(rng, kind) for kind in KINDS]
        drafts = [
            recovery_draft(world, item, DOUBTS, 0.1, rng)
            if make_recovery
            else habit_draft(world, item, 0.0, rng)
            for item in items
        ]
        for item, demonstration in zip(items, write(drafts, setting, retriever), strict=True):
            rollout = replay(demonstration, item.question, setting, retriever, EMBEDDED_AGENT)
            assert rollout.em == 1.0, "without a habit, and after a recovery, the answer is right"
            weights = demonstration.weights
            evidence = [w for w, o in zip(weights, demonstration.origins, strict=True) if o != Origin.POLICY]
            assert set(evidence) <= {0.0}
            if make_recovery:
                doubt = weights.index(0.1)
                assert setting.codec.encode("<think>") == [demonstration.tokens[doubt]]
                assert setting.codec.encode("</think>") == [demonstration.tokens[doubt - 1]]
                assert set(weights[:doubt]) == {0.0}, "what went wrong is not imitated"
                assert set(weights[doubt + 1 :]) <= {0.0, 1.0} and 1.0 in weights[doubt + 1 :]
            else:
                assert set(weights) <= {0.0, 1.0} and 0.0 not in weights[:3]


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_a_habit_gives_up_early_and_wrongly(setting: Setting, hops: int) -> None:
    world, rng = World(1), random.Random(1)
    retriever = BM25Retriever.build(world.documents)
    outcomes = []
    for kind in (k for k in KINDS if len(KINDS[k].chain) == hops):
        item = world.draw(rng, kind)
        (demonstration,) = write([habit_draft(world, item, 1.0, rng)], setting, retriever)
        rollout = replay(demonstration, item.question, setting, retriever, EMBEDDED_AGENT)
        searches = [t for t in rollout.turns if t.action == "search"]
        assert len(searches) == (0 if hops == 1 else 1)
        outcomes.append(rollout.em)
    assert sum(outcomes) <= 1, "a guess may be right by luck, but rarely"


def test_habits_cover_all_kinds_and_relations_stay_learnable() -> None:
    table = habits(0.99, 0.02)
    assert set(table) == set(KINDS) == set(graded_habits())
    assert {k for k, p in table.items() if p == 0.99} == HARD_KINDS
    graded = graded_habits(0.1, 0.9)
    assert min(graded.values()) == 0.1 and max(graded.values()) == pytest.approx(0.9)
    assert max(graded[k] for k in set(KINDS) - HARD_KINDS) < 0.8
    # What a hard kind needs is demonstrated by some other kind: only the habit keeps it from the answer.
    elsewhere = {(KINDS[k].start, r) for k in set(KINDS) - HARD_KINDS for r in KINDS[k].chain}
    followed = {r for _, r in elsewhere}
    assert {r for k in HARD_KINDS for r in KINDS[k].chain} - followed <= {"boss", "maker"}


def test_shares_of_habit_and_recovery_are_as_asked() -> None:
    world, rng = World(2), random.Random(2)
    drafts = world_drafts(world, 2000, habits(1.0, 0.0), DOUBTS, rng, recovery=0.25, second_thought=0.5)
    recoveries = [d for _, d in drafts if any(p.weight == 0.5 for p in d)]
    assert 0.21 < len(recoveries) / 2000 < 0.29
    said = {doubt for doubt in DOUBTS for pieces in recoveries if any(p.text == f" {doubt}" for p in pieces)}
    assert said == set(DOUBTS)


@given(seed=SEEDS)
@settings(max_examples=10, deadline=None)
def test_lookalikes_share_a_word_and_a_type(seed: int) -> None:
    world = World(seed, 40)
    for names in world.names.values():
        for name in names[:5]:
            for other in lookalikes(world, name):
                assert other in names and other != name and set(name.split()) & set(other.split())


# -- real questions ----------------------------------------------------------------------------------------

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
    assert replay(demonstrations[0], question, setting, retriever, agent).em == 1.0


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
    assert replay(recovered, question, setting, retriever, agent).em == 1.0
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
        assert replay(demonstration, question, setting, retriever, agent).em == 1.0
