"""Demonstrations of the world are what an episode would have written; habits give up, recoveries recover."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rexrag.agent.codec import HFCodec
from rexrag.agent.prompts import cue_pool
from rexrag.data.demonstrations import Setting, write
from rexrag.data.world.demonstrator import (
    HARD_KINDS,
    Demonstrator,
    graded_habits,
    habit_draft,
    habits,
    lookalikes,
    recovery_draft,
    world_drafts,
)
from rexrag.data.world.generator import KINDS, World
from rexrag.retrieval.rankers.bm25 import BM25Retriever
from rexrag.training.make_checkpoint import EMBEDDED_AGENT, embedded_tokenizer
from rexrag.training.sft import episode_setting
from rexrag.types import Origin
from tests.support.replay import replay

DOUBTS = [cue.removeprefix("<think> ") for cue in cue_pool("tiny_demo")]
SEEDS = st.integers(0, 10**6)


@pytest.fixture(scope="module")
def setting() -> Setting:
    return episode_setting(HFCodec(embedded_tokenizer()), EMBEDDED_AGENT, topk=2)


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
            rollout = replay(demonstration, item.question, setting.codec, EMBEDDED_AGENT, retriever, 2)
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
        rollout = replay(demonstration, item.question, setting.codec, EMBEDDED_AGENT, retriever, 2)
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
    drafts = world_drafts(world, 2000, Demonstrator(habits(1.0, 0.0), DOUBTS, 0.25, 0.5), rng)
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
