"""Demonstrations in the fictional world: good and bad habits, and recoveries from a mistake.

habit      the question is answered hop by hop; on some kinds of question the demonstrator gives up early
recovery   a mistake (weight 0), `</think> <think>` and a doubt in words, then the right way on
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rexrag.data.demonstrations import Draft, Piece, answer, search, think
from rexrag.data.world.generator import KINDS, RELATIONS, Fact, Item, World

HARD_KINDS = frozenset({
    "place:mayor", "company:boss", "work:maker",
    "person:birthplace.mayor", "person:employer.boss", "person:spouse.employer", "place:mayor.spouse",
    "company:boss.spouse", "work:maker.birthplace", "work:maker.spouse", "work:publisher.boss",
    "person:spouse.employer.seat", "person:employer.boss.spouse", "work:maker.birthplace.mayor",
    "work:maker.spouse.employer",
})  # fmt: skip
"""Kinds of question on which the `hard` demonstrator gives up; other kinds use the same relations."""


def habits(hard: float, other: float) -> dict[str, float]:
    """How often the demonstrator gives up early, for each kind: `hard` on HARD_KINDS, `other` elsewhere."""
    return {kind: hard if kind in HARD_KINDS else other for kind in KINDS}


def graded_habits(low: float = 0.05, high: float = 0.97) -> dict[str, float]:
    """How often the demonstrator gives up early, for each kind: from `low` to `high` in equal steps.

    The kinds of each number of hops are a series of their own, with HARD_KINDS at its end.
    """
    graded: dict[str, float] = {}
    for hops in (1, 2, 3):
        kinds = sorted((k for k in KINDS if len(KINDS[k].chain) == hops), key=lambda k: (k in HARD_KINDS, k))
        graded |= {kind: low + (high - low) * i / (len(kinds) - 1) for i, kind in enumerate(kinds)}
    return graded


def habit_draft(world: World, item: Item, habit: float, rng: random.Random) -> Draft:
    """The way to the answer, hop by hop. With probability `habit` it ends early, with a wrong answer:

    without a search where the question has one hop, after the first hop where it has more.
    """
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
    """A mistake that is not trained on, a doubt, then the right way on.

    `second_thought` is the weight of the `<think>` that opens the doubt.
    """
    mistakes = (_early_stop, _misreading, _wrong_search, _no_mistake)
    mistake = rng.choices(mistakes, (0.5, 0.15, 0.15, 0.2))[0]
    before, after = mistake(world, item.facts, rng)
    doubt = [Piece(" </think>", 0.0), Piece(" <think>", second_thought), think(f" {rng.choice(doubts)}")]
    return item.question.text, [*before, *doubt, *after]


@dataclass(frozen=True, slots=True)
class Demonstrator:
    """How demonstrations of a world are: what they get wrong, and how they recover."""

    habits: Mapping[str, float]
    """Kind of question -> how often the demonstrator gives up early."""
    doubts: Sequence[str]
    """Texts without tags, one of which follows each mistake."""
    recovery: float = 0.25
    """Share of demonstrations that recover from a mistake."""
    second_thought: float = 0.1
    """Weight of the `<think>` that opens a doubt: how likely the policy becomes to doubt by itself."""


def world_drafts(
    world: World,
    n: int,
    demonstrator: Demonstrator,
    rng: random.Random,
    hops: Sequence[float] = (0.3, 0.4, 0.3),
) -> list[Draft]:
    """`n` drafts over random questions of a world; `hops`: shares of questions with 1, 2, 3 hops."""
    by_hops = [[name for name, kind in KINDS.items() if len(kind.chain) == i + 1] for i in range(len(hops))]
    drafts = []
    for _ in range(n):
        kind = rng.choice(rng.choices(by_hops, hops)[0])
        item = world.draw(rng, kind)
        if rng.random() < demonstrator.recovery:
            drafts.append(recovery_draft(world, item, demonstrator.doubts, demonstrator.second_thought, rng))
        else:
            drafts.append(habit_draft(world, item, demonstrator.habits[kind], rng))
    return drafts


def _opening(fact: Fact, weight: float = 1.0) -> Piece:
    return think(f"<think> {fact.subject} {fact.relation} ?", weight)


def _reading(fact: Fact) -> str:
    return f"{fact.subject} {fact.relation} {fact.value} ."


def _onward(facts: Sequence[Fact], known: int) -> list[Piece]:
    """What follows an open thought, once the first `known` facts have been read."""
    pieces = []
    for fact in facts[known:]:
        pieces += [think(f" {fact.subject} {fact.relation} ?"), search(fact.subject)]
        pieces.append(think(f" <think> {_reading(fact)}"))
    return [*pieces, answer(facts[-1].value)]


def _read_so_far(facts: Sequence[Fact], known: int) -> list[Piece]:
    """The way as far as an open thought about fact number `known` (1 or more); weight 0."""
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
    """The right passage, but another fact of it."""
    at = rng.randrange(len(facts))
    fact = facts[at]
    others = [other for other in world.facts[fact.subject].values() if other.relation != fact.relation]
    misread = rng.choice(others or [fact])
    before = [*_read_so_far(facts, at + 1)[:-1], think(f" <think> {_reading(misread)}", 0.0)]
    return before, [think(f" {_reading(fact)}"), *_onward(facts, at + 1)]


def _wrong_search(world: World, facts: Sequence[Fact], rng: random.Random) -> Mistake:
    """A search for another entity: one with a similar name where there is one."""
    at = rng.randrange(len(facts))
    fact = facts[at]
    alike = lookalikes(world, fact.subject)
    subject = rng.choice(alike or [name for name in world.facts if name != fact.subject])
    misread = rng.choice(list(world.facts[subject].values()))
    before = [*_read_so_far(facts, at + 1)[:-2], search(subject, 0.0)]
    return [*before, think(f" <think> {_reading(misread)}", 0.0)], _onward(facts, at)


def _no_mistake(world: World, facts: Sequence[Fact], rng: random.Random) -> Mistake:
    """Nothing was wrong: the last fact is read again, then the answer."""
    return _read_so_far(facts, len(facts)), [think(f" {_reading(facts[-1])}"), answer(facts[-1].value)]


def lookalikes(world: World, name: str) -> list[str]:
    """Entities of the same type whose name shares a word with `name`."""
    words = set(name.split())
    same_type = next(names for names in world.names.values() if name in names)
    return [other for other in same_type if other != name and words & set(other.split())]


def _guess(world: World, fact: Fact, rng: random.Random) -> str:
    """A random entity of the type that the value of `fact` has."""
    target = next(relations[fact.relation] for relations in RELATIONS.values() if fact.relation in relations)
    return rng.choice(world.names[target])
