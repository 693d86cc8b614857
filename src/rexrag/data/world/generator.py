"""A fictional world from a seed: people, places, companies, works; passages and multi-hop questions.

Names are composed of a fixed, small set of words, so that one tokenizer serves every world, and words are
shared on purpose: several people have the same first or last name, a company and a film have a word in
common. A search for a part of a name therefore finds the wrong passage. Larger worlds use more words a name.

Everything follows from `random.Random(str)`, which is the same on every platform.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rexrag.data.apportion import apportion
from rexrag.data.questions import write_questions
from rexrag.errors import DataError
from rexrag.io import write_jsonl
from rexrag.types import Document, Question

Split = Literal["train", "held-out"]

_WORDS = {
    "first": """
        anna otto clara hugo ella oscar ruth felix nora emil ida leo vera karl mira jonas lena
        max greta paul rosa simon alma erik tilda anton elsa bruno marta viktor sofia theo agnes
        lukas hanna gustav olga rolf dora ivan selma arno tessa milan petra boris judith henrik
        flora stefan edith magnus wilma kurt irena jakob linda sven carla albin thea ludvig
        berta ingo maja rufus della cedric sonja walter heidi tobias ulla konrad astrid julius
        edda marek yara nils""",
    "last": """
        berg lund falk holm strand dahl krantz moller weiss brandt keller vogel hahn stein baum
        roth wolff sommer frost lindt hoffe ekman nyberg sandell torvald granlund haug solberg
        rasmus vinter kovac novak dvorak horvat petrov morav zeman kral benes sykora lang graf
        huber maurer ziegler bauer fuchs kaiser engel sauer orban szabo farkas lukacs nemeth
        bogdan marin popa ionescu serban rossi conti marino greco lombard costa ferrari moretti
        galli fontana duval lambert moreau renard girard mercier leclerc fournier gauthier
        chevalier beaumont""",
    "place": """
        tarn velmora oskel brunfeld kessin aldova mirrow dunhal reska halvik orlen tovar sellin
        quarn ebrach lissow numar ferrol gastin hovel ildar jastow korvel luvena maskel nordin
        opava pelling ruston salvik tembrow ulmar varsk wexley yarrow zellin ansby birkow celmar
        dorset elving fannar gimle harrow insel jarvik kolby larkin mendel norvik ostrow pravik
        quellin rhoden sturmar trevick umber vintar wessel zorvik""",
    "country": """
        velland ostria karvania morland suvania eldoria brenland torvia halmark nordenia
        pallovia quentara rhovania selkland turvania ulveria westria yorvania zemland arvonia""",
    "adjective": """
        silent golden broken hidden distant crimson frozen burning hollow gentle ancient bitter
        empty little lonely midnight pale quiet rusty savage secret silver simple sleeping
        stolen sudden velvet wandering wild wooden""",
    "noun": """
        river harbor garden mountain lantern mirror castle forest island shadow thunder winter
        crown feather bridge candle desert falcon harvest meadow orchard palace raven sailor
        tower valley violin whisper window anchor""",
    "trade": """
        press studios records pictures works motors labs foods bank airlines""",
}
WORDS: dict[str, list[str]] = {name: words.split() for name, words in _WORDS.items()}
"""The words that names are made of."""
NAMES: dict[str, tuple[str, str]] = {  # where all words but the last come from, and the last
    "person": ("first", "last"),
    "place": ("place", "place"),
    "country": ("country", "country"),
    "company": ("noun", "trade"),
    "work": ("adjective", "noun"),
}
SHORTEST = {"person": 2, "place": 1, "country": 1, "company": 2, "work": 2}
SHARE = {"person": 1.0, "place": 0.25, "country": 0.08, "company": 0.25, "work": 0.5}
"""Entities of a type for each person."""
FILL = 0.5
"""At most this share of all possible names of a length is used; then names get one word longer."""

RELATIONS: dict[str, dict[str, str]] = {  # type -> relation -> type of its value
    "person": {"birthplace": "place", "spouse": "person", "employer": "company"},
    "place": {"country": "country", "mayor": "person"},
    "country": {"capital": "place"},
    "company": {"seat": "place", "boss": "person"},
    "work": {"maker": "person", "publisher": "company"},
}
PHRASES: dict[str, tuple[str, ...]] = {  # what a passage says of its subject
    "birthplace": ("was born in {}", "comes from {}"),
    "spouse": ("is married to {}",),
    "employer": ("works for {}", "is employed by {}"),
    "country": ("lies in {}", "is a place in {}"),
    "mayor": ("is governed by {}", "has mayor {}"),
    "capital": ("has the capital {}",),
    "seat": ("is based in {}",),
    "boss": ("is led by {}", "has boss {}"),
    "maker": ("is a film made by {}", "is a book made by {}", "is a song made by {}"),
    "publisher": ("was released by {}",),
}


@dataclass(frozen=True, slots=True)
class Kind:
    """A question type: the type of its start entity, the relations to follow, and its wordings."""

    start: str
    chain: tuple[str, ...]
    texts: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.start}:{'.'.join(self.chain)}"


def _kind(name: str, *texts: str) -> Kind:
    start, _, chain = name.partition(":")
    return Kind(start, tuple(chain.split(".")), texts)


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        _kind("person:birthplace", "Where was {} born?", "In which place was {} born?"),
        _kind("person:spouse", "Who is married to {}?", "Who is the spouse of {}?"),
        _kind("person:employer", "Which company does {} work for?", "What is the company of {}?"),
        _kind("place:country", "In which country is {}?", "In which country does {} lie?"),
        _kind("place:mayor", "Who is the mayor of {}?", "Who governs {}?"),
        _kind("country:capital", "What is the capital of {}?", "Which place is the capital of {}?"),
        _kind("company:seat", "Where is {} based?", "In which place is {} based?"),
        _kind("company:boss", "Who is the boss of {}?", "Who leads {}?"),
        _kind("work:maker", "Who made {}?", "Who is the maker of {}?"),
        _kind("work:publisher", "Which company released {}?", "What company is {} from?"),
        _kind("person:birthplace.country", "In which country was {} born?", "From which country is {}?"),
        _kind("person:birthplace.mayor", "Who is the mayor of the place where {} was born?",
              "Who governs the place where {} was born?"),
        _kind("person:employer.seat", "Where is the company of {} based?",
              "In which place is the company that {} works for based?"),
        _kind("person:employer.boss", "Who is the boss of the company of {}?",
              "Who leads the company that {} works for?"),
        _kind("person:spouse.birthplace", "Where was the spouse of {} born?",
              "In which place was the spouse of {} born?"),
        _kind("person:spouse.employer", "Which company does the spouse of {} work for?",
              "What is the company of the spouse of {}?"),
        _kind("place:mayor.birthplace", "Where was the mayor of {} born?",
              "In which place was the mayor of {} born?"),
        _kind("place:mayor.spouse", "Who is married to the mayor of {}?",
              "Who is the spouse of the mayor of {}?"),
        _kind("company:seat.country", "In which country is {} based?",
              "What is the country where {} is based?"),
        _kind("company:boss.spouse", "Who is married to the boss of {}?",
              "Who is the spouse of the boss of {}?"),
        _kind("work:maker.birthplace", "Where was the maker of {} born?",
              "In which place was the maker of {} born?"),
        _kind("work:maker.spouse", "Who is married to the maker of {}?",
              "Who is the spouse of the maker of {}?"),
        _kind("work:publisher.seat", "Where is the company that released {} based?",
              "In which place is the company that released {} based?"),
        _kind("work:publisher.boss", "Who is the boss of the company that released {}?",
              "Who leads the company that released {}?"),
        _kind("person:birthplace.country.capital", "What is the capital of the country where {} was born?",
              "Which place is the capital of the country {} comes from?"),
        _kind("person:spouse.employer.seat", "Where is the company of the spouse of {} based?",
              "In which place is the company of the spouse of {} based?"),
        _kind("company:boss.birthplace.country", "In which country was the boss of {} born?",
              "From which country is the boss of {}?"),
        _kind("person:employer.boss.spouse", "Who is married to the boss of the company of {}?",
              "Who is the spouse of the boss of the company of {}?"),
        _kind("work:maker.birthplace.mayor", "Who is the mayor of the place where the maker of {} was born?",
              "Who governs the place where the maker of {} was born?"),
        _kind("work:maker.spouse.employer", "Which company does the spouse of the maker of {} work for?",
              "What is the company of the spouse of the maker of {}?"),
    )
}  # fmt: skip


def vocabulary() -> list[str]:
    """Every lower-case word that any world can write in a passage, a question or a relation name, sorted."""
    text = [" ".join(texts) for texts in PHRASES.values()]
    text += [" ".join(kind.texts) for kind in KINDS.values()]
    words = set(" ".join(text).replace("{}", " ").replace("?", " ").lower().split()) | set(PHRASES) | {"and"}
    return sorted(words.union(*WORDS.values()))


@dataclass(frozen=True, slots=True)
class Fact:
    """`subject`'s `relation` is `value`; subject and value are names."""

    subject: str
    relation: str
    value: str


@dataclass(frozen=True, slots=True)
class Item:
    """A question with the facts that lead to its answer, in order."""

    question: Question
    facts: tuple[Fact, ...]


class World:
    """A world of `people` people and places, companies and works in proportion (SHARE).

    Names have as few words as FILL allows, and `longer_names` more, as those of larger worlds have.
    `names[type]` lists entities; the first quarter of each list starts held-out questions only, the rest
    training questions only, so that no (entity, chain of relations) is on both sides.
    """

    def __init__(self, seed: int, people: int = 120, longer_names: int = 0) -> None:
        if people < 12:
            raise DataError(f"a world needs at least 12 people, got {people}")
        self.seed, self.people = seed, people
        rng = random.Random(f"world/{seed}/{people}/{longer_names}")
        words = {name: rng.sample(listed, len(listed)) for name, listed in WORDS.items()}
        self.names: dict[str, list[str]] = {
            kind: _names(kind, max(4, round(people * share)), longer_names, words, rng)
            for kind, share in SHARE.items()
        }
        self.facts: dict[str, dict[str, Fact]] = {}
        for kind, relations in RELATIONS.items():
            for name in self.names[kind]:
                self.facts[name] = {
                    relation: Fact(name, relation, rng.choice(self.names[target]))
                    for relation, target in relations.items()
                    if relation != "spouse"
                }
        self._marry(rng)
        self.documents: list[Document] = [
            Document(str(i), f'"{name}"\n{_passage(name, list(facts.values()), rng)}')
            for i, (name, facts) in enumerate(self.facts.items())
        ]

    def _marry(self, rng: random.Random) -> None:
        single = self.names["person"][:]
        rng.shuffle(single)
        for a, b in zip(single[::2], single[1::2], strict=False):
            self.facts[a]["spouse"], self.facts[b]["spouse"] = Fact(a, "spouse", b), Fact(b, "spouse", a)

    @property
    def entities(self) -> int:
        return len(self.facts)

    def item(self, kind: str, text: int, name: str, split: str = "train") -> Item | None:
        """The question of this kind and wording about `name`; None where it would answer itself."""
        facts: list[Fact] = []
        at = name
        for relation in KINDS[kind].chain:
            if relation not in self.facts[at]:  # one person of an odd number is not married
                return None
            facts.append(self.facts[at][relation])
            at = facts[-1].value
        if len({name, *(fact.value for fact in facts)}) <= len(facts):
            return None  # the chain comes back to an entity it has passed
        words = KINDS[kind].texts[text].format(name)
        if f" {at} " in f" {words.rstrip('?')} ":
            return None
        question = Question(
            id=f"{kind}/{text}/{name.replace(' ', '_')}", text=words, answers=(at,),
            source=f"world-{self.seed}-{self.people}", split=split, hops=len(facts), kind=kind,
        )  # fmt: skip
        return Item(question, tuple(facts))

    def starts(self, kind: str, split: Split | None = None) -> list[str]:
        """Names that a question of this kind may start from; None takes both sides of the split."""
        names = self.names[KINDS[kind].start]
        quarter = (len(names) + 3) // 4
        return names if split is None else names[:quarter] if split == "held-out" else names[quarter:]

    def draw(self, rng: random.Random, kind: str, split: Split | None = None) -> Item:
        """One random question of a kind (with replacement), for demonstrations."""
        names = self.starts(kind, split)
        for _ in range(1000):
            item = self.item(kind, rng.randrange(len(KINDS[kind].texts)), rng.choice(names), split or "train")
            if item is not None:
                return item
        raise DataError(f"the world of {self.people} people has no question of kind '{kind}'")

    def items(
        self, split: Split, n: int, seed: int = 0, hops: Sequence[float] = (0.35, 0.45, 0.2)
    ) -> list[Item]:
        """`n` different questions of one side, `hops[i]` of them with i + 1 hops, kinds as even as they go.

        Raises DataError where the world has fewer.
        """
        rng = random.Random(f"questions/{self.seed}/{self.people}/{split}/{seed}")
        chosen: list[Item] = []
        for hop, want in enumerate(_shares(n, hops), start=1):
            kinds = [name for name, kind in KINDS.items() if len(kind.chain) == hop]
            pools = [self._pool(kind, split, rng) for kind in kinds]
            found = list(itertools.islice(_round_robin(pools), want))
            if len(found) < want:
                raise DataError(
                    f"a world of {self.people} people has {len(found)} {split} questions of {hop} hops, "
                    f"asked for {want}; ask for fewer questions or more people"
                )
            chosen += found
        rng.shuffle(chosen)
        return chosen

    def questions(
        self, split: Split, n: int, seed: int = 0, hops: Sequence[float] = (0.35, 0.45, 0.2)
    ) -> list[Question]:
        """The questions of `items`."""
        return [item.question for item in self.items(split, n, seed, hops)]

    def _pool(self, kind: str, split: Split, rng: random.Random) -> Iterator[Item]:
        names = self.starts(kind, split)
        order = list(range(len(names) * len(KINDS[kind].texts)))
        rng.shuffle(order)
        items = (self.item(kind, i // len(names), names[i % len(names)], split) for i in order)
        return (item for item in items if item is not None)

    def write(self, folder: str | Path, train: int, held_out: int, seed: int = 0) -> None:
        """`corpus.jsonl`, `train.jsonl` and `dev.jsonl` in the formats of a user's own data."""
        folder = Path(folder)
        write_jsonl(folder / "corpus.jsonl", ({"id": d.id, "contents": d.contents} for d in self.documents))
        sides: list[tuple[str, Split, int]] = [("train", "train", train), ("dev", "held-out", held_out)]
        for name, split, n in sides:
            write_questions(folder / f"{name}.jsonl", self.questions(split, n, seed))


def _names(kind: str, count: int, longer: int, words: dict[str, list[str]], rng: random.Random) -> list[str]:
    """`count` different names of `longer` more words than FILL asks for, over prefixes of the word lists.

    The prefixes are as short as FILL allows: the fewer words are in use, the more names share one.
    """
    length = SHORTEST[kind]
    while FILL * _combinations(kind, length, 1.0) < count:
        length += 1
    length += longer
    part = next(p / 20 for p in range(1, 21) if FILL * _combinations(kind, length, p / 20) >= count)
    front, last = (words[name][: _prefix(name, part)] for name in NAMES[kind])
    lists = [*([front] * (length - 1)), last]
    taken: dict[str, None] = {}
    while len(taken) < count:
        drawn = [rng.choice(listed) for listed in lists]
        if len(set(drawn)) == length:
            taken[" ".join(drawn).title()] = None
    return list(taken)


def _prefix(words: str, part: float) -> int:
    return max(1, int(len(WORDS[words]) * part))


def _combinations(kind: str, length: int, part: float) -> int:
    """How many names of `length` different words there are."""
    front, last = NAMES[kind]
    if front == last:
        return math.perm(_prefix(last, part), length)
    return math.perm(_prefix(front, part), length - 1) * _prefix(last, part)


def _passage(name: str, facts: list[Fact], rng: random.Random) -> str:
    rng.shuffle(facts)
    phrases = [rng.choice(PHRASES[fact.relation]).format(fact.value) for fact in facts]
    *others, last = phrases
    return f"{name} {', '.join(others)} and {last}." if others else f"{name} {last}."


def _shares(n: int, weights: Sequence[float]) -> list[int]:
    """`n` questions split over the numbers of hops."""
    if not weights or len(weights) > 3 or min(weights) < 0 or sum(weights) <= 0:
        raise DataError(f"hops must be 1 to 3 weights that are not negative, got {list(weights)}")
    return apportion(n, weights)


def _round_robin(pools: list[Iterator[Item]]) -> Iterator[Item]:
    while pools:
        alive = []
        for pool in pools:
            item = next(pool, None)
            if item is not None:
                alive.append(pool)
                yield item
        pools = alive
