"""The fictional world and its tokenizer: determinism, a split that holds, and a vocabulary that is enough."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from rexrag.agent.codec import HFCodec, load_codec
from rexrag.agent.prompts import cue_pool, render_prompt
from rexrag.agent.protocols.tags import NOTICE, extract_answer, parse_action, render_evidence
from rexrag.agent.reward import exact_match
from rexrag.data.questions import load_questions
from rexrag.data.world.generator import KINDS, PHRASES, RELATIONS, World, vocabulary
from rexrag.data.world.tokenizer import TAGS, build_tokenizer, save_tokenizer
from rexrag.errors import DataError
from rexrag.retrieval.corpus import read_corpus
from rexrag.retrieval.rankers.bm25 import BM25Retriever
from rexrag.training.make_checkpoint import embedded_tokenizer

SEEDS = st.integers(0, 10**9)


def digest(world: World) -> str:
    text = "\n".join([d.contents for d in world.documents] + [q.text for q in world.questions("train", 50)])
    return hashlib.sha256(text.encode()).hexdigest()


def test_a_seed_gives_the_same_bytes_on_every_platform() -> None:
    assert digest(World(7)) == "d204a663c75f5ec7d682f6de787221b1733daa6e33179e5adf4eb42fec1a7e16"
    assert digest(World(7)) != digest(World(8))


@given(SEEDS, st.sampled_from([0, 1, 2]), st.sampled_from([12, 120, 2000]))
@settings(max_examples=12, deadline=None)
def test_names_are_different_and_as_long_as_asked(seed: int, longer: int, people: int) -> None:
    world, plain = World(seed, people, longer), World(seed, people)
    for kind, names in world.names.items():
        assert len(set(names)) == len(names) == len(plain.names[kind])
        lengths = {len(name.split()) for name in names}
        assert lengths == {len(plain.names[kind][0].split()) + longer}
        assert all(len(set(name.split())) == len(name.split()) for name in names)


@given(SEEDS, st.sampled_from([12, 30, 120, 300]))
@settings(max_examples=15, deadline=None)
def test_no_held_out_entity_and_chain_is_trained_on(seed: int, people: int) -> None:
    world = World(seed, people)
    n = people // 2
    sides = {
        split: {
            (i.facts[0].subject, tuple(f.relation for f in i.facts))
            for i in world.items(split, n, hops=(1, 1, 0))
        }
        for split in ("train", "held-out")
    }  # fmt: skip
    assert sides["train"] and sides["held-out"]
    assert not sides["train"] & sides["held-out"]
    # Stronger: no entity starts a question on both sides.
    assert not {e for e, _ in sides["train"]} & {e for e, _ in sides["held-out"]}


@given(SEEDS)
@settings(max_examples=10, deadline=None)
def test_questions_follow_from_the_passages_and_do_not_answer_themselves(seed: int) -> None:
    world = World(seed)
    text = {d.title: d.text for d in world.documents}
    items = world.items("train", 200, seed)
    assert len({i.question.id for i in items}) == len({i.question.text for i in items}) == 200
    for item in items:
        question, facts = item.question, item.facts
        assert question.answers == (facts[-1].value,)
        assert question.answers[0].lower() not in question.text.lower()
        assert facts[0].subject in question.text
        assert question.hops == len(facts) == len(KINDS[question.kind].chain)
        for fact, after in itertools.pairwise(facts):
            assert fact.value == after.subject
        for fact in facts:
            written = [phrase.format(fact.value) for phrase in PHRASES[fact.relation]]
            assert any(phrase in text[fact.subject] for phrase in written)


def test_hops_follow_the_weights_and_kinds_are_even() -> None:
    questions = World(3).questions("train", 200, hops=(1, 2, 1))
    assert Counter(q.hops for q in questions) == {1: 50, 2: 100, 3: 50}
    kinds = Counter(q.kind for q in questions if q.hops == 2)
    assert max(kinds.values()) - min(kinds.values()) <= 1


def test_several_hops_need_several_searches_and_part_of_a_name_finds_somebody_else() -> None:
    world = World(5)
    retriever = BM25Retriever.build(world.documents)
    items = world.items("train", 300)
    for item in items:
        found = retriever.search([item.facts[0].subject], 2)[0]
        assert found[0].title == item.facts[0].subject, "the full name brings its own passage first"
    several = [i for i in items if len(i.facts) > 1]
    one_search = [
        any(i.facts[-1].value in d.text for d in retriever.search([i.facts[0].subject], 2)[0])
        for i in several
    ]
    assert sum(one_search) / len(one_search) < 0.3
    people = world.names["person"]
    by_last_name = [retriever.search([name.split()[-1]], 1)[0][0].title == name for name in people]
    assert sum(by_last_name) / len(people) < 0.5


def test_large_worlds_keep_the_vocabulary_and_stay_quick() -> None:
    known = set(vocabulary())
    began = time.perf_counter()
    world = World(1, 5000)
    assert world.entities == 5000 + 1250 + 400 + 1250 + 2500 and len(world.documents) == world.entities
    assert time.perf_counter() - began < 5
    for names in world.names.values():
        assert len(set(names)) == len(names)
        assert {word for name in names for word in name.lower().split()} <= known


@pytest.mark.slow
def test_a_hundred_thousand_entities() -> None:
    began = time.perf_counter()
    world = World(1, 48_500)
    assert world.entities > 100_000
    assert len(world.questions("train", 2000)) == 2000
    assert time.perf_counter() - began < 30


def test_files_read_back_as_a_users_own_data(tmp_path: Path) -> None:
    world = World(2, 60)
    world.write(tmp_path, train=40, held_out=20, seed=1)
    assert list(read_corpus(tmp_path / "corpus.jsonl")) == world.documents
    train = load_questions(tmp_path / "train.jsonl")
    assert [(q.text, q.answers, q.hops, q.kind) for q in train] == [
        (q.text, q.answers, q.hops, q.kind) for q in world.questions("train", 40, 1)
    ]
    assert len(load_questions(tmp_path / "dev.jsonl")) == 20


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: World(0, 5), "at least 12 people"),
        (lambda: World(0, 12).questions("train", 5000), "has .* train questions of 1 hops"),
        (lambda: World(0).questions("train", 10, hops=(1, -1)), "weights that are not negative"),
        (lambda: World(0).questions("train", 10, hops=(1, 1, 1, 1)), "1 to 3 weights"),
    ],
)
def test_what_a_world_cannot_give_is_said(make, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make()


def test_every_relation_has_a_kind_of_one_hop() -> None:
    direct = {kind.chain[0] for kind in KINDS.values() if len(kind.chain) == 1}
    assert direct == {r for relations in RELATIONS.values() for r in relations} == set(PHRASES)


# -- tokenizer ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def codec() -> HFCodec:
    return HFCodec(embedded_tokenizer())


@given(seed=SEEDS, people=st.sampled_from([12, 120, 3000]))
@settings(max_examples=10, deadline=None)
def test_no_word_of_any_world_is_unknown(codec: HFCodec, seed: int, people: int) -> None:
    world = World(seed, people)
    unknown = codec.tokenizer.unk_token_id
    documents = world.documents[:: max(1, people // 60)]
    for document in documents:
        assert unknown not in render_evidence([document], codec, 200)
    for question in world.questions("train", 12):
        ids = codec.prompt(render_prompt("terse", question.text))
        assert unknown not in ids
        assert codec.decode(ids).strip() == f"question: {question.text.lower()}"
        answer = codec.decode(codec.encode(f"<answer> {question.answers[0]} </answer>"))
        said = extract_answer(answer)
        assert said is not None and exact_match(said, question.answers) == 1.0


def test_cues_notice_and_tags_are_covered(codec: HFCodec) -> None:
    unknown = codec.tokenizer.unk_token_id
    for text in [*cue_pool("tiny"), *cue_pool("tiny_demo"), NOTICE]:
        assert unknown not in codec.encode(text)
    for tag in TAGS:
        assert len(codec.encode(tag)) == 1
    assert codec.encode("zzyzx") == [unknown]
    # 0 pads, 1 ends a text: the model's configuration says the same.
    assert (codec.tokenizer.pad_token_id, codec.tokenizer.eos_token_id) == (0, 1)


@given(ids=st.lists(st.integers(3, 440), max_size=40), cut=st.integers(0, 40))
def test_decoding_is_a_homomorphism(codec: HFCodec, ids: list[int], cut: int) -> None:
    assert codec.decode(ids) == codec.decode(ids[:cut]) + codec.decode(ids[cut:])


def test_actions_are_read_from_decoded_text_and_found_by_the_retriever(codec: HFCodec) -> None:
    world = World(4)
    name = world.names["company"][0]
    text = codec.decode(codec.encode(f"<think> {name} boss ? </think> <search> {name} </search>"))
    action = parse_action(text)
    assert action is not None and (action.kind, action.argument) == ("search", name.lower())
    assert BM25Retriever.build(world.documents).search([action.argument], 1)[0][0].title == name


def test_the_saved_folder_loads_without_remote_code(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(["Some extra wording"])
    save_tokenizer(tokenizer, tmp_path)
    loaded = AutoTokenizer.from_pretrained(str(tmp_path), trust_remote_code=False)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert "wording" in loaded.get_vocab()
    text = "<think> Extra wording, or </think>\n\nsome?"
    ids = load_codec(tmp_path).encode(text)
    assert ids == tokenizer.encode(text, add_special_tokens=False)
    assert load_codec(tmp_path).decode(ids) == " <think> extra wording, <unk> </think>\n\n some?"
