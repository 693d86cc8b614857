"""Demonstrations for a supervised warm-up: habits, recoveries, and the way an agent reads evidence.

A demonstration is written as pieces (text with a weight, or a search) and only then turned into tokens, so
that the searches of a whole batch go to the retriever at once. Evidence is exactly what an episode inserts:
the caller passes the same renderer.

    habit      the question answered hop by hop; on some kinds of question the demonstrator gives up early
    recovery   a wrong step (weight 0), `</think> <think>` and a doubt in words, then the right way on
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from rexrag.data.world.generator import KINDS, RELATIONS, Fact, Item, World
from rexrag.types import Document, Origin

HARD_KINDS = frozenset({
    "place:mayor", "company:boss", "work:maker",
    "person:birthplace.mayor", "person:employer.boss", "person:spouse.employer", "place:mayor.spouse",
    "company:boss.spouse", "work:maker.birthplace", "work:maker.spouse", "work:publisher.boss",
    "person:spouse.employer.seat", "person:employer.boss.spouse", "work:maker.birthplace.mayor",
    "work:maker.spouse.employer",
})  # fmt: skip
"""Kinds on which the `hard` demonstrator gives up. Every relation in them is used by another kind too."""


def habits(hard: float, other: float) -> dict[str, float]:
    """How often the demonstrator gives up early, for each kind: `hard` on HARD_KINDS, `other` elsewhere."""
    return {kind: hard if kind in HARD_KINDS else other for kind in KINDS}


def graded_habits(low: float = 0.05, high: float = 0.97) -> dict[str, float]:
    """Habits spread evenly from `low` to `high` over the kinds of each number of hops, HARD_KINDS last."""
    graded: dict[str, float] = {}
    for hops in (1, 2, 3):
        kinds = sorted((k for k in KINDS if len(KINDS[k].chain) == hops), key=lambda k: (k in HARD_KINDS, k))
        graded |= {kind: low + (high - low) * i / (len(kinds) - 1) for i, kind in enumerate(kinds)}
    return graded


class Codec(Protocol):
    """What is needed of `agent.episode.Codec`."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def prompt(self, user_message: str) -> list[int]: ...


class Search(Protocol):
    """What is needed of `retrieval.base.Retriever`."""

    def search(self, queries: Sequence[str], topk: int) -> list[list[Document]]: ...


@dataclass(frozen=True, slots=True)
class Setting:
    """How an episode would write a demonstration: its codec, its instruction, its evidence, its limits."""

    codec: Codec
    instruct: Callable[[str], str]
    """A question -> the user message."""
    render: Callable[[Sequence[Document]], list[int]]
    """Documents -> evidence tokens."""
    topk: int
    search_turns: int
    turn_tokens: int


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A response to imitate: `weights[i]` is the weight of token i's log-probability in the loss.

    EVIDENCE tokens have weight 0 here; a warm-up may add a small language-model loss on them.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    origins: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of text with a weight; `query`: the environment's answer to this search follows it."""

    text: str
    weight: float = 1.0
    query: str | None = None


Draft = tuple[str, list[Piece]]
"""A question's text and the pieces of the response."""


def think(text: str, weight: float = 1.0) -> Piece:
    """Text inside an open thought."""
    return Piece(text, weight)


def search(query: str, weight: float = 1.0) -> Piece:
    """Close the thought and look `query` up."""
    return Piece(f" </think> <search> {query} </search>", weight, query)


def answer(text: str, weight: float = 1.0) -> Piece:
    """Close the thought and answer."""
    return Piece(f" </think> <answer> {text} </answer>", weight)


def write(drafts: Sequence[Draft], setting: Setting, retriever: Search) -> list[Demonstration]:
    """Turn drafts into tokens, with one batched search for all of them."""
    queries = [piece.query for _, pieces in drafts for piece in pieces if piece.query is not None]
    results = iter(retriever.search(queries, setting.topk) if queries else [])
    demonstrations = []
    for question, pieces in drafts:
        tokens: list[int] = []
        origins: list[int] = []
        weights: list[float] = []
        for piece in pieces:
            ids = setting.codec.encode(piece.text)
            tokens += ids
            origins += [int(Origin.POLICY)] * len(ids)
            weights += [piece.weight] * len(ids)
            if piece.query is not None:
                evidence = setting.render(next(results))
                tokens += evidence
                origins += [int(Origin.EVIDENCE)] * len(evidence)
                weights += [0.0] * len(evidence)
        prompt = setting.codec.prompt(setting.instruct(question))
        demonstrations.append(Demonstration(tuple(prompt), tuple(tokens), tuple(origins), tuple(weights)))
    return demonstrations


def habit_draft(world: World, item: Item, habit: float, rng: random.Random) -> Draft:
    """Hop by hop; with probability `habit` it gives up: before searching (1 hop) or after the first hop."""
    facts = item.facts
    gives_up = rng.random() < habit
    if gives_up and len(facts) == 1:
        return item.question.text, [_opening(facts[0]), answer(_guess(world, facts[0], rng))]
    pieces = [_opening(facts[0]), search(facts[0].subject), think(f" <think> {_reading(facts[0])}")]
    if gives_up:
        return item.question.text, [*pieces, answer(facts[0].value)]
    return item.question.text, [*pieces, *_onward(facts, 1)]


def recovery_draft(
    world: World, item: Item, doubts: Sequence[str], second_thought: float, rng: random.Random
) -> Draft:
    """A wrong step that is not trained on, a doubt, then the right way on.

    `second_thought` is the weight of the `<think>` that opens the doubt: how likely the policy becomes to
    doubt by itself.
    """
    mistakes = (_early_stop, _misreading, _wrong_search, _no_mistake)
    mistake = rng.choices(mistakes, (0.5, 0.15, 0.15, 0.2))[0]
    before, after = mistake(world, item.facts, rng)
    doubt = [Piece(" </think>", 0.0), Piece(" <think>", second_thought), think(f" {rng.choice(doubts)}")]
    return item.question.text, [*before, *doubt, *after]


def world_drafts(
    world: World, n: int, kind_habits: Mapping[str, float], doubts: Sequence[str], rng: random.Random,
    recovery: float = 0.25, second_thought: float = 0.1, hops: Sequence[float] = (0.3, 0.4, 0.3),
) -> list[Draft]:  # fmt: skip
    """`n` drafts over random questions of a world, a share `recovery` of them recoveries."""
    by_hops = [[name for name, kind in KINDS.items() if len(kind.chain) == i + 1] for i in range(len(hops))]
    drafts = []
    for _ in range(n):
        kind = rng.choice(rng.choices(by_hops, hops)[0])
        item = world.draw(rng, kind)
        if rng.random() < recovery:
            drafts.append(recovery_draft(world, item, doubts, second_thought, rng))
        else:
            drafts.append(habit_draft(world, item, kind_habits[kind], rng))
    return drafts


def _opening(fact: Fact, weight: float = 1.0) -> Piece:
    return think(f"<think> {fact.subject} {fact.relation} ?", weight)


def _reading(fact: Fact) -> str:
    return f"{fact.subject} {fact.relation} {fact.value} ."


def _onward(facts: Sequence[Fact], known: int) -> list[Piece]:
    """A thought is open and the first `known` facts have been read: the rest of the way."""
    pieces = []
    for fact in facts[known:]:
        pieces += [think(f" {fact.subject} {fact.relation} ?"), search(fact.subject)]
        pieces.append(think(f" <think> {_reading(fact)}"))
    return [*pieces, answer(facts[-1].value)]


def _read_so_far(facts: Sequence[Fact], known: int) -> list[Piece]:
    """The way up to a last thought that has read `known` (>= 1) facts and is open; nothing trained on."""
    pieces = [_opening(facts[0], 0.0)]
    for i, fact in enumerate(facts[:known]):
        pieces += [think(f" {fact.subject} {fact.relation} ?", 0.0)] if i else []
        pieces += [search(fact.subject, 0.0), think(f" <think> {_reading(fact)}", 0.0)]
    return pieces


Mistake = tuple[list[Piece], list[Piece]]
"""Pieces before the doubt (not trained on) and after it."""


def _early_stop(world: World, facts: Sequence[Fact], rng: random.Random) -> Mistake:
    known = 0 if rng.random() < 0.15 else rng.randrange(len(facts))
    if known:
        return _read_so_far(facts, known), _onward(facts, known)
    first = facts[0]
    read = think(f" <think> {_reading(first)}")
    return [_opening(first, 0.0)], [search(first.subject), read, *_onward(facts, 1)]


def _misreading(world: World, facts: Sequence[Fact], rng: random.Random) -> Mistake:
    """Another fact of the right passage was read; the right one is in the same passage."""
    at = rng.randrange(len(facts))
    fact = facts[at]
    others = [other for other in world.facts[fact.subject].values() if other.relation != fact.relation]
    misread = rng.choice(others or [fact])
    before = [*_read_so_far(facts, at + 1)[:-1], think(f" <think> {_reading(misread)}", 0.0)]
    return before, [think(f" {_reading(fact)}"), *_onward(facts, at + 1)]


def _wrong_search(world: World, facts: Sequence[Fact], rng: random.Random) -> Mistake:
    """Someone else was looked up, of a name that looks alike where there is one."""
    at = rng.randrange(len(facts))
    fact = facts[at]
    alike = lookalikes(world, fact.subject)
    subject = rng.choice(alike or [name for name in world.facts if name != fact.subject])
    misread = rng.choice(list(world.facts[subject].values()))
    before = [*_read_so_far(facts, at + 1)[:-2], search(subject, 0.0)]
    return [*before, think(f" <think> {_reading(misread)}", 0.0)], _onward(facts, at)


def _no_mistake(world: World, facts: Sequence[Fact], rng: random.Random) -> Mistake:
    """All was right: read the last fact again and answer."""
    return _read_so_far(facts, len(facts)), [think(f" {_reading(facts[-1])}"), answer(facts[-1].value)]


def lookalikes(world: World, name: str) -> list[str]:
    """Entities of the same type whose name shares a word with `name`."""
    words = set(name.split())
    same_type = next(names for names in world.names.values() if name in names)
    return [other for other in same_type if other != name and words & set(other.split())]


def _guess(world: World, fact: Fact, rng: random.Random) -> str:
    """Any entity of the type that `fact` has as its value."""
    target = next(relations[fact.relation] for relations in RELATIONS.values() if fact.relation in relations)
    return rng.choice(world.names[target])
